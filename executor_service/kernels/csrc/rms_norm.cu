// rms_norm, and add_rms_norm which adds a residual first: one block per row, the row stays in registers.
#include "numbers.cuh"

namespace {

constexpr int kMaxWarps = 32;

__device__ __forceinline__ float sum_of_block(float value) {
    __shared__ float parts[kMaxWarps];
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = (blockDim.x + 31) / 32;
    if (lane == 0) parts[warp] = value;
    __syncthreads();
    value = lane < num_warps ? parts[lane] : 0.0f;
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// blockDim.x is a multiple of 32; kPacks packs of kCount elements per thread cover a row of `width`.
template <typename T, int kCount, int kPacks, bool kAdds>
__device__ __forceinline__ void normalize_row(
    const T* __restrict__ x, T* __restrict__ residual, const T* __restrict__ weight, T* __restrict__ out, int width,
    float epsilon) {
    const long long row = static_cast<long long>(blockIdx.x) * width;
    Pack<T, kCount> values[kPacks];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int at = (i * blockDim.x + threadIdx.x) * kCount;
        if (at >= width) continue;
        values[i] = load<T, kCount>(x + row + at);
        if constexpr (kAdds) {
            const Pack<T, kCount> other = load<T, kCount>(residual + row + at);
#pragma unroll
            for (int e = 0; e < kCount; ++e)
                values[i].elements[e] = from_float<T>(to_float(other.elements[e]) + to_float(values[i].elements[e]));
            store<T, kCount>(residual + row + at, values[i]);
        }
#pragma unroll
        for (int e = 0; e < kCount; ++e) squares += to_float(values[i].elements[e]) * to_float(values[i].elements[e]);
    }
    const float scale = rsqrtf(sum_of_block(squares) / width + epsilon);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int at = (i * blockDim.x + threadIdx.x) * kCount;
        if (at >= width) continue;
        const Pack<T, kCount> factors = load<T, kCount>(weight + at);
        Pack<T, kCount> result;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
            // Rounded before the weight, as the models that transformers has do it.
            const float normal = rounded<T>(to_float(values[i].elements[e]) * scale);
            result.elements[e] = from_float<T>(to_float(factors.elements[e]) * normal);
        }
        store<T, kCount>(out + row + at, result);
    }
}

}  // namespace

#define KERNELS(NAME, T, KIND, COUNT, PACKS)                                                                       \
    extern "C" __global__ void __launch_bounds__(1024) rms_norm_##NAME##_##KIND##_##PACKS(                         \
        const T* x, const T* weight, T* out, int width, float epsilon) {                                           \
        normalize_row<T, COUNT, PACKS, false>(x, nullptr, weight, out, width, epsilon);                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024) add_rms_norm_##NAME##_##KIND##_##PACKS(                     \
        const T* x, T* residual, const T* weight, T* out, int width, float epsilon) {                              \
        normalize_row<T, COUNT, PACKS, true>(x, residual, weight, out, width, epsilon);                            \
    }
#define WIDTHS(NAME, T)                      \
    KERNELS(NAME, T, wide, kWide<T>, 1)      \
    KERNELS(NAME, T, wide, kWide<T>, 2)      \
    KERNELS(NAME, T, wide, kWide<T>, 4)      \
    KERNELS(NAME, T, single, 1, 1)           \
    KERNELS(NAME, T, single, 1, 4)           \
    KERNELS(NAME, T, single, 1, 16)
FOR_EACH_DTYPE(WIDTHS)
