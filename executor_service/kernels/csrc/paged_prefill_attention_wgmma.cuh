// Hopper's instructions for prefill attention: barriers in shared memory, tensor copies (TMA), products of a warpgroup
// (wgmma). What `descriptor` says about shared memory is in the PTX ISA, "Asynchronous warpgroup level matrix".
#pragma once
#include "paged_prefill_attention.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace prefill {

// An mbarrier's phases alternate; a waiter names the parity of the phase whose end it waits for.
__device__ __forceinline__ void init_barrier(unsigned barrier, unsigned num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(unsigned barrier, unsigned num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}

__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@ended bra.uni done;\n"
        "bra.uni again;\n"
        "done:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Makes ordinary writes to shared memory visible to tensor copies and tensor cores.
__device__ __forceinline__ void publish_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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

// Shared memory as a product reads it, in atoms of 8 rows x 128 bytes whose packs are swizzled. `row_stride` bytes
// separate atoms of consecutive groups of eight rows, `column_stride` bytes those of consecutive 64 columns, where the
// instruction reads several.
__device__ __forceinline__ unsigned long long descriptor(unsigned address, int row_stride, int column_stride) {
    constexpr unsigned long long kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<unsigned long long>(row_stride >> 4) << 32 |
           static_cast<unsigned long long>(column_stride >> 4) << 16 | ((address & 0x3ffff) >> 4);
}

// Products are asynchronous: begin, issue, commit, and wait until at most kPending commits are unfinished.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After a wait: from here on the compiler may read the sums, and not before.
template <int kCount> __device__ __forceinline__ void settle(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_32(d) SUMS_16(d, 0), SUMS_16(d, 16)
#define SUMS_64(d) SUMS_16(d, 0), SUMS_16(d, 16), SUMS_16(d, 32), SUMS_16(d, 48)
#define NAMES_32                                                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32                                                                                                           \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// 64 x N sums of products over 16 elements, `adds` to what is there or replaces it.
// multiply_shared: both operands in shared memory, their rows 16 elements of what is summed over.
// multiply_registers: the first in registers; the second's rows in shared memory are what is summed over.
#define MULTIPLY(T, TYPE, N, COUNT, A, B, C, D, E, F)                                                                 \
    __device__ __forceinline__ void multiply_shared(                                                                  \
        T, float (&sums)[COUNT], unsigned long long a, unsigned long long b, int adds) {                              \
        asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" C ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT "}, %" A       \
                     ", %" B ", adds, 1, 1, 0, 0;\n}\n"                                                               \
                     : SUMS_##COUNT(sums)                                                                             \
                     : "l"(a), "l"(b), "r"(adds));                                                                    \
    }                                                                                                                 \
    __device__ __forceinline__ void multiply_registers(                                                               \
        T, float (&sums)[COUNT], const unsigned* a, unsigned long long b, int adds) {                                 \
        asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" F ", 0;\n"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT "}, {%" A      \
                     ", %" B ", %" C ", %" D "}, %" E ", adds, 1, 1, 1;\n}\n"                                         \
                     : SUMS_##COUNT(sums)                                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));                                \
    }
MULTIPLY(bfloat16, "bf16", "128", 64, "64", "65", "66", "67", "68", "69")
MULTIPLY(float16, "f16", "128", 64, "64", "65", "66", "67", "68", "69")
MULTIPLY(bfloat16, "bf16", "64", 32, "32", "33", "34", "35", "36", "37")
MULTIPLY(float16, "f16", "64", 32, "32", "33", "34", "35", "36", "37")
#undef MULTIPLY

}  // namespace prefill

#endif
