// What prefill attention asks of Hopper beside warpgroup.cuh: its own tensor copies and products, registers that warps
// hand over, named barriers.
#pragma once
#include "paged_prefill_attention.cuh"
#include "warpgroup.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace prefill {

// A box of the cache to shared memory. `map` is [groups of 8 tokens, heads, halves of a head, 8 tokens, 64 elements].
__device__ __forceinline__ void copy_box(unsigned to, const void* map, int head, int group, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %2, %3, %4}], "
        "[%5];" ::"r"(to),
        "l"(map), "r"(0), "r"(head), "r"(group), "r"(barrier)
        : "memory");
}

template <int kCount> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Named barriers between warps; 0 is that of __syncthreads.
__device__ __forceinline__ void sync_threads(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

__device__ __forceinline__ void announce_to(int barrier, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Four 8x8 matrices of 16-bit elements to shared memory; lane l says where row l % 8 of matrix l / 8 goes.
__device__ __forceinline__ void store_matrices(unsigned to, const unsigned (&from)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]),
                 "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

// As multiply_shared, but the first operand is in registers, and the second's rows in shared memory are what is summed
// over.
#define MULTIPLY(T, TYPE, N, COUNT, A, B, C, D, E, F)                                                                 \
    __device__ __forceinline__ void multiply_registers(                                                               \
        T, float (&sums)[COUNT], const unsigned* a, unsigned long long b, int adds) {                                 \
        asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" F ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT "}, {%" A      \
                     ", %" B ", %" C ", %" D "}, %" E ", adds, 1, 1, 1;\n}\n"                                         \
                     : ALL_SUMS_##COUNT(sums)                                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));                                \
    }
MULTIPLY(bfloat16, "bf16", "128", 64, "64", "65", "66", "67", "68", "69")
MULTIPLY(float16, "f16", "128", 64, "64", "65", "66", "67", "68", "69")
MULTIPLY(bfloat16, "bf16", "64", 32, "32", "33", "34", "35", "36", "37")
MULTIPLY(float16, "f16", "64", 32, "32", "33", "34", "35", "36", "37")
#undef MULTIPLY

}  // namespace prefill

#endif
