// Sums over a block.
#pragma once

constexpr int kMaxWarps = 32;

// Every thread gets the sum. blockDim.x is a multiple of 32; calls with the same `parts` have a barrier in between.
__device__ __forceinline__ float sum_of_block(float value, float (&parts)[kMaxWarps]) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    if (lane == 0) parts[warp] = value;
    __syncthreads();
    value = lane < num_warps ? parts[lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}
