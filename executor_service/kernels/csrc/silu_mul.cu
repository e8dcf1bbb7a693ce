// silu(gate) * up for rows of [gate | up]: a block per row, or per piece of a row where rows are few or long.
#include "dependent.cuh"
#include "last_first.cuh"
#include "packs.cuh"

namespace {

template <typename T> __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <> __device__ __forceinline__ float silu<float>(float x) { return x / (1.0f + expf(-x)); }

// The block's threads hold kPacks packs each of piece blockIdx.y of a row, the last row first; all loads are under way at once.
template <typename T, int kCount, int kPacks>
__device__ __forceinline__ void silu_mul(const T* __restrict__ gate_up, T* __restrict__ out, int width) {
    let_next_begin();
    const long long row = last_first();
    const int first = (blockIdx.y * kPacks * blockDim.x + threadIdx.x) * kCount, step = blockDim.x * kCount;
    const T* gate_row = gate_up + row * 2 * width + first;
    T* out_row = out + row * width + first;
    wait_for_previous();
    Pack<T, kCount> gates[kPacks], ups[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        gates[i] = load<T, kCount>(gate_row + i * step);
        ups[i] = load<T, kCount>(gate_row + width + i * step);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        if (first + i * step >= width) continue;
        Floats<kCount> gate = floats_of(gates[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) gate.elements[e] = silu<T>(gate.elements[e]);
        // Rounded in between, as by two operations.
        gate = floats_of(pack_of<T>(gate));
        const Floats<kCount> up = floats_of(ups[i]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) gate.elements[e] *= up.elements[e];
        store<T, kCount>(out_row + i * step, pack_of<T>(gate));
    }
}

}  // namespace

#define KERNEL(NAME, T, KIND, COUNT, PACKS)                                             \
    extern "C" __global__ void __launch_bounds__(512) silu_mul_##NAME##_##KIND##_##PACKS( \
        const T* gate_up, T* out, int width) {                                          \
        silu_mul<T, COUNT, PACKS>(gate_up, out, width);                                 \
    }
#define KERNELS(NAME, T)                  \
    KERNEL(NAME, T, wide, kWide<T>, 1)    \
    KERNEL(NAME, T, wide, kWide<T>, 4)    \
    KERNEL(NAME, T, single, 1, 4)
FOR_EACH_DTYPE(KERNELS)
