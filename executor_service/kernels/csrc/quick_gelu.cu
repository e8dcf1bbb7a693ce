// x * sigmoid(1.702 * x), rounded in between as by three operations: blocks of threads that hold kPacks packs each.
#include "dependent.cuh"
#include "last_first.cuh"
#include "packs.cuh"

namespace {

constexpr int kPacks = 4;

template <typename T> __device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

template <> __device__ __forceinline__ float sigmoid<float>(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T, int kCount>
__device__ __forceinline__ void quick_gelu(const T* __restrict__ x, T* __restrict__ out, long long count) {
    let_next_begin();
    const long long first = (last_first() * kPacks * blockDim.x + threadIdx.x) * kCount;
    const long long step = static_cast<long long>(blockDim.x) * kCount;
    wait_for_previous();
    Pack<T, kCount> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
        if (first + i * step < count) packs[i] = load<T, kCount>(x + first + i * step);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= count) continue;
        const Floats<kCount> values = floats_of(packs[i]);
        Floats<kCount> gates;
#pragma unroll
        for (int e = 0; e < kCount; ++e) gates.elements[e] = 1.702f * values.elements[e];
        gates = floats_of(pack_of<T>(gates));
#pragma unroll
        for (int e = 0; e < kCount; ++e) gates.elements[e] = sigmoid<T>(gates.elements[e]);
        gates = floats_of(pack_of<T>(gates));
#pragma unroll
        for (int e = 0; e < kCount; ++e) gates.elements[e] *= values.elements[e];
        store<T, kCount>(out + first + i * step, pack_of<T>(gates));
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                     \
    extern "C" __global__ void quick_gelu_##NAME##_wide(const T* x, T* out, long long count) {               \
        quick_gelu<T, kWide<T>>(x, out, count);                                                              \
    }                                                                                                        \
    extern "C" __global__ void quick_gelu_##NAME##_single(const T* x, T* out, long long count) {             \
        quick_gelu<T, 1>(x, out, count);                                                                     \
    }
FOR_EACH_DTYPE(KERNELS)
