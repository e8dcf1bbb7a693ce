// x @ weight^T for any sizes and element types: a warp per output feature and eight rows of x, no tensor cores.
#include "dependent.cuh"
#include "numbers.cuh"
#include "small_linear_parts.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kRows = 8;

__device__ __forceinline__ float sum_of_warp(float value) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// sums[row] = x[row] . weight, over `width` columns, for `rows` rows of x.
template <typename T, int kCount>
__device__ __forceinline__ void dot_rows(
    float (&sums)[kRows], const T* __restrict__ x, const T* __restrict__ weight, int rows, int width) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) sums[row] = 0.0f;
    for (int at = threadIdx.x % 32 * kCount; at < width; at += 32 * kCount) {
        const Pack<T, kCount> factors = load<T, kCount>(weight + at);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            if (row >= rows) break;
            const Pack<T, kCount> values = load<T, kCount>(x + static_cast<long long>(row) * width + at);
#pragma unroll
            for (int e = 0; e < kCount; ++e)
                sums[row] = fmaf(to_float(values.elements[e]), to_float(factors.elements[e]), sums[row]);
        }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) sums[row] = sum_of_warp(sums[row]);
}

template <typename T, int kCount, bool kGated>
__device__ __forceinline__ void any_linear(
    const T* x, const T* weight, const T* bias, const T* residual, T* out, int all_rows, int features, int width) {
    let_next_begin();
    wait_for_previous();
    const int feature = blockIdx.x * kWarps + threadIdx.x / 32, first = blockIdx.y * kRows;
    if (feature >= features) return;
    const int rows = min(kRows, all_rows - first);
    const T* from = x + static_cast<long long>(first) * width;
    const T* column = weight + static_cast<long long>(feature) * width;
    float sums[kRows], others[kRows];
    dot_rows<T, kCount>(sums, from, column, rows, width);
    if constexpr (kGated) {
        dot_rows<T, kCount>(others, from, column + static_cast<long long>(features) * width, rows, width);
    }
    if (threadIdx.x % 32) return;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        const long long to = static_cast<long long>(first + row) * features + feature;
        float result = sums[row];
        if constexpr (kGated) {
            // Rounded where linear, silu and the product apart would have been.
            const float gate = rounded<T>(result);
            result = rounded<T>(silu<T>(gate)) * rounded<T>(others[row]);
        } else {
            if (bias) result += to_float(bias[feature]);
            if (residual) result += to_float(residual[to]);
        }
        out[to] = from_float<T>(result);
    }
}

}  // namespace

#define KERNEL(NAME, T, COUNT, WIDTH, KIND, GATED)                                                               \
    extern "C" __global__ void __launch_bounds__(32 * kWarps) small_linear_any_##NAME##_##KIND##_##WIDTH(        \
        const T* x, const T* weight, const T* bias, const T* residual, T* out, int rows, int features, int width) { \
        any_linear<T, COUNT, GATED>(x, weight, bias, residual, out, rows, features, width);                      \
    }
#define KERNELS(NAME, T)                              \
    KERNEL(NAME, T, kWide<T>, wide, plain, false)     \
    KERNEL(NAME, T, kWide<T>, wide, gated, true)      \
    KERNEL(NAME, T, 1, single, plain, false)          \
    KERNEL(NAME, T, 1, single, gated, true)
FOR_EACH_DTYPE(KERNELS)
