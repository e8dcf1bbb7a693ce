// silu(gate) * up for rows of [gate | up]: a stream of packs, as many threads as keep the memory busy.
#include "numbers.cuh"

namespace {

template <typename T, int kCount>
__device__ __forceinline__ void silu_mul(const T* __restrict__ gate_up, T* __restrict__ out, long long rows, int width) {
    const int packs_per_row = width / kCount;
    const long long packs = rows * packs_per_row;
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs; i += stride) {
        const long long row = i / packs_per_row;
        const int at = static_cast<int>(i - row * packs_per_row) * kCount;
        const T* source = gate_up + row * 2 * width + at;
        const Pack<T, kCount> gate = load<T, kCount>(source), up = load<T, kCount>(source + width);
        Pack<T, kCount> result;
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
            const float g = to_float(gate.elements[e]);
            const float activated = rounded<T>(g / (1.0f + expf(-g)));
            result.elements[e] = from_float<T>(activated * to_float(up.elements[e]));
        }
        store<T, kCount>(out + row * width + at, result);
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                      \
    extern "C" __global__ void silu_mul_##NAME##_wide(const T* gate_up, T* out, long long rows, int width) {   \
        silu_mul<T, kWide<T>>(gate_up, out, rows, width);                                                      \
    }                                                                                                          \
    extern "C" __global__ void silu_mul_##NAME##_single(const T* gate_up, T* out, long long rows, int width) { \
        silu_mul<T, 1>(gate_up, out, rows, width);                                                             \
    }
FOR_EACH_DTYPE(KERNELS)
