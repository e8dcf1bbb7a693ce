// uint8 levels to floats by a table with one row of 256 levels per channel.
#include "dependent.cuh"
#include "numbers.cuh"

namespace {

constexpr int kLevels = 256;

// Planes of `length` bytes, a multiple of 16, each of one channel; `pieces` blocks per plane, whose channel's row of
// the table lies in shared memory.
template <typename T>
__device__ __forceinline__ void normalize_planes(
    const uint4* __restrict__ levels, const float* __restrict__ table, T* __restrict__ out, int length,
    int num_channels, int pieces) {
    __shared__ T values[kLevels];
    let_next_begin();
    wait_for_previous();
    const unsigned plane = blockIdx.x / pieces;
    const int piece = blockIdx.x % pieces, packs = length / 16;
    for (int i = threadIdx.x; i < kLevels; i += blockDim.x)
        values[i] = from_float<T>(table[plane % num_channels * kLevels + i]);
    __syncthreads();
    for (int i = piece * blockDim.x + threadIdx.x; i < packs; i += pieces * blockDim.x) {
        const long long at = static_cast<long long>(plane) * packs + i;
        const uint4 pack = levels[at];
        const unsigned words[4] = {pack.x, pack.y, pack.z, pack.w};
        Pack<T, kWide<T>> results[16 / kWide<T>];
#pragma unroll
        for (int e = 0; e < 16; ++e)
            results[e / kWide<T>].elements[e % kWide<T>] = values[words[e / 4] >> (e % 4 * 8) & 0xff];
#pragma unroll
        for (int k = 0; k < 16 / kWide<T>; ++k) store<T, kWide<T>>(out + at * 16 + k * kWide<T>, results[k]);
    }
}

// Any shape: element i is of channel i / inner % num_channels.
template <typename T>
__device__ __forceinline__ void normalize_elements(
    const unsigned char* __restrict__ levels, const float* __restrict__ table, T* __restrict__ out, long long count,
    long long inner, int num_channels) {
    let_next_begin();
    wait_for_previous();
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        out[i] = from_float<T>(table[i / inner % num_channels * kLevels + levels[i]]);
}

}  // namespace

#define KERNELS(NAME, T)                                                                                         \
    extern "C" __global__ void normalize_##NAME##_wide(                                                          \
        const uint4* levels, const float* table, T* out, int length, int num_channels, int pieces) {             \
        normalize_planes<T>(levels, table, out, length, num_channels, pieces);                                   \
    }                                                                                                            \
    extern "C" __global__ void normalize_##NAME##_single(                                                        \
        const unsigned char* levels, const float* table, T* out, long long count, long long inner,               \
        int num_channels) {                                                                                      \
        normalize_elements<T>(levels, table, out, count, inner, num_channels);                                   \
    }
FOR_EACH_DTYPE(KERNELS)
