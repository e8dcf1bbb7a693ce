// rms_norm, and add_rms_norm which adds a residual first: one block per row, the row stays in registers.
#include "block_sum.cuh"
#include "dependent.cuh"
#include "last_first.cuh"
#include "packs.cuh"

namespace {

// blockDim.x is a multiple of 32; kPacks packs of kCount elements per thread cover a row of `width`. All loads of a
// thread are under way before the first is used.
template <typename T, int kCount, int kPacks, bool kAdds>
__device__ __forceinline__ void normalize_row(
    const T* __restrict__ x, T* residual, const T* __restrict__ weight, T* __restrict__ out, int width, float epsilon) {
    __shared__ float parts[kMaxWarps];
    let_next_begin();
    const long long row = last_first() * width;
    const int first = threadIdx.x * kCount, step = blockDim.x * kCount;
    wait_for_previous();
    Pack<T, kCount> values[kPacks], factors[kPacks], others[kAdds ? kPacks : 1];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        values[i] = load<T, kCount>(x + row + first + i * step);
        if constexpr (kAdds) others[i] = load<T, kCount>(residual + row + first + i * step);
        // With one pack it is latency that counts; with several the weights are in the L1 cache when they are needed.
        if constexpr (kPacks == 1) factors[i] = load<T, kCount>(weight + first + i * step);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        if constexpr (kAdds) add_residual(values[i], others[i], residual + row + first + i * step);
        const Floats<kCount> elements = floats_of(values[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) squares += elements.elements[e] * elements.elements[e];
    }
    const float scale = rsqrtf(sum_of_block(squares, parts) / width + epsilon);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        if constexpr (kPacks > 1) factors[i] = load<T, kCount>(weight + first + i * step);
        Floats<kCount> normal = floats_of(values[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) normal.elements[e] *= scale;
        // Rounded before the weight, as the models that transformers has do it.
        normal = floats_of(pack_of<T>(normal));
        const Floats<kCount> weights = floats_of(factors[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) normal.elements[e] *= weights.elements[e];
        store<T, kCount>(out + row + first + i * step, pack_of<T>(normal));
    }
}

}  // namespace

#define KERNELS(NAME, T, KIND, COUNT, PACKS, THREADS)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_##NAME##_##KIND##_##PACKS(                      \
        const T* x, const T* weight, T* out, int width, float epsilon) {                                           \
        normalize_row<T, COUNT, PACKS, false>(x, nullptr, weight, out, width, epsilon);                            \
    }                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) add_rms_norm_##NAME##_##KIND##_##PACKS(                  \
        const T* x, T* residual, const T* weight, T* out, int width, float epsilon) {                              \
        normalize_row<T, COUNT, PACKS, true>(x, residual, weight, out, width, epsilon);                            \
    }
#define WIDTHS(NAME, T)                          \
    KERNELS(NAME, T, wide, kWide<T>, 1, 512)    \
    KERNELS(NAME, T, wide, kWide<T>, 2, 512)    \
    KERNELS(NAME, T, wide, kWide<T>, 4, 512)    \
    KERNELS(NAME, T, wide, kWide<T>, 8, 512)    \
    KERNELS(NAME, T, single, 1, 4, 512)          \
    KERNELS(NAME, T, single, 1, 16, 1024)
FOR_EACH_DTYPE(WIDTHS)
