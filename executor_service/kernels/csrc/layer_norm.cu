// layer_norm, and add_layer_norm which adds a residual first: one block per row, the row stays in registers.
#include "block_sum.cuh"
#include "dependent.cuh"
#include "last_first.cuh"
#include "packs.cuh"

namespace {

// blockDim.x is a multiple of 32; kPacks packs of kCount elements per thread cover a row of `width`. All loads of a
// thread are under way before the first is used. The variance is that of the differences from the mean.
template <typename T, int kCount, int kPacks, bool kAdds>
__device__ __forceinline__ void normalize_row(
    const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight, const T* __restrict__ bias,
    T* __restrict__ total, T* __restrict__ out, int width, float epsilon) {
    __shared__ float sums[kMaxWarps], squares[kMaxWarps];
    let_next_begin();
    const long long row = last_first() * width;
    const int first = threadIdx.x * kCount, step = blockDim.x * kCount;
    wait_for_previous();
    Pack<T, kCount> values[kPacks], others[kAdds ? kPacks : 1], factors[kPacks], summands[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        values[i] = load<T, kCount>(x + row + first + i * step);
        if constexpr (kAdds) others[i] = load<T, kCount>(residual + row + first + i * step);
        // With one pack it is latency that counts; with several these are in the L1 cache when they are needed.
        if constexpr (kPacks == 1) {
            factors[i] = load<T, kCount>(weight + first + i * step);
            summands[i] = load<T, kCount>(bias + first + i * step);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        if constexpr (kAdds) add_residual(values[i], others[i], total + row + first + i * step);
        const Floats<kCount> elements = floats_of(values[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum += elements.elements[e];
    }
    const float mean = sum_of_block(sum, sums) / width;
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        const Floats<kCount> elements = floats_of(values[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) square += (elements.elements[e] - mean) * (elements.elements[e] - mean);
    }
    const float scale = rsqrtf(sum_of_block(square, squares) / width + epsilon);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        if constexpr (kPacks > 1) {
            factors[i] = load<T, kCount>(weight + first + i * step);
            summands[i] = load<T, kCount>(bias + first + i * step);
        }
        Floats<kCount> normal = floats_of(values[i]);
        const Floats<kCount> by = floats_of(factors[i]), plus = floats_of(summands[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e)
            normal.elements[e] = (normal.elements[e] - mean) * scale * by.elements[e] + plus.elements[e];
        store<T, kCount>(out + row + first + i * step, pack_of<T>(normal));
    }
}

}  // namespace

#define KERNELS(NAME, T, KIND, COUNT, PACKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(512) layer_norm_##NAME##_##KIND##_##PACKS(                   \
        const T* x, const T* weight, const T* bias, T* out, int width, float epsilon) {                       \
        normalize_row<T, COUNT, PACKS, false>(x, nullptr, weight, bias, nullptr, out, width, epsilon);        \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(512) add_layer_norm_##NAME##_##KIND##_##PACKS(               \
        const T* x, const T* residual, const T* weight, const T* bias, T* total, T* out, int width,           \
        float epsilon) {                                                                                      \
        normalize_row<T, COUNT, PACKS, true>(x, residual, weight, bias, total, out, width, epsilon);          \
    }
#define WIDTHS(NAME, T)                     \
    KERNELS(NAME, T, wide, kWide<T>, 1)     \
    KERNELS(NAME, T, wide, kWide<T>, 4)     \
    KERNELS(NAME, T, single, 1, 4)          \
    KERNELS(NAME, T, single, 1, 16)
FOR_EACH_DTYPE(WIDTHS)
