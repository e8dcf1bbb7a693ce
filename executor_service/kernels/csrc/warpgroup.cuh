// Hopper's tensor copies (TMA), clusters and warpgroup products (wgmma) on tiles of 128-byte rows in shared memory.
// What `descriptor` says about a tile is in the PTX ISA, "Asynchronous warpgroup level matrix".
#pragma once

#include "asynchronous.cuh"
#include "numbers.cuh"

// As the driver encodes it; a kernel's parameter.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// --- tensor copies ---

__device__ __forceinline__ void bring_near(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box of a two-dimensional map that begins at this column and row.
__device__ __forceinline__ void copy_box(
    unsigned to, const TensorMap* map, int column, int row, unsigned barrier, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}

// The box of a map [groups, halves, rows, columns] that begins at this group and column.
__device__ __forceinline__ void copy_groups(
    unsigned to, const TensorMap* map, int column, int group, unsigned barrier, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(to), "l"(map), "r"(column), "r"(0), "r"(group), "r"(barrier),
        "l"(policy)
        : "memory");
}

// --- clusters ---

// Every thread of every block arrives, then waits; neither orders anything but barriers' own beginnings.

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// What another block of the cluster has at this address of its shared memory.
__device__ __forceinline__ unsigned address_at_rank(unsigned address, int rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// 16 bytes to another block, whose barrier counts them when they are there.
__device__ __forceinline__ void store_at_rank(unsigned to, const float* from, unsigned barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]), "f"(from[3]), "r"(barrier) : "memory");
}

__device__ __forceinline__ void load_shared_floats(float (&to)[4], unsigned from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(from) : "memory");
}

// At another block's barrier.
__device__ __forceinline__ void arrive_at_rank(unsigned barrier, int rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at_rank(barrier, rank)) : "memory");
}

// As wait_for_phase, for what other blocks of the cluster have stored.
__device__ __forceinline__ void wait_for_cluster_phase(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// --- products: asynchronous; begin, issue, commit, and wait until at most kPending commits are unfinished ---

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending = 0> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After a wait: from here on the compiler may read the sums, and not before.
template <int kCount> __device__ __forceinline__ void settle(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Shared memory as a product reads it, in atoms of 8 rows x 128 bytes whose packs are swizzled; 16 elements further on in
// all rows is two more. `row_stride` bytes separate atoms of consecutive groups of eight rows, `column_stride` bytes those
// of consecutive 64 columns, where the instruction reads several.
__device__ __forceinline__ unsigned long long descriptor(
    unsigned address, int row_stride = 1024, int column_stride = 16) {
    constexpr unsigned long long kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<unsigned long long>(row_stride >> 4) << 32 |
           static_cast<unsigned long long>(column_stride >> 4) << 16 | ((address & 0x3ffff) >> 4);
}

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 4)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32                                                                                                  \
    NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48                                                                                                  \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64                                                                                                  \
    NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ALL_SUMS_8(d) SUMS_8(d, 0)
#define ALL_SUMS_16(d) SUMS_16(d, 0)
#define ALL_SUMS_32(d) SUMS_16(d, 0), SUMS_16(d, 16)
#define ALL_SUMS_48(d) SUMS_16(d, 0), SUMS_16(d, 16), SUMS_16(d, 32)
#define ALL_SUMS_64(d) SUMS_16(d, 0), SUMS_16(d, 16), SUMS_16(d, 32), SUMS_16(d, 48)

// sums[64][N] of products over 16 elements of rows of a and rows of b: `adds` to what is there or replaces it. Thread
// 32 w + 4 g + q of the warpgroup has rows 16 w + g and 16 w + g + 8, of each eight columns the two from 2 q on.
#define MULTIPLY(T, TYPE, N, COUNT, A, B, ADDS)                                                                   \
    __device__ __forceinline__ void multiply_shared(                                                              \
        T, float (&sums)[COUNT], unsigned long long a, unsigned long long b, int adds) {                          \
        asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" ADDS ", 0;\n"                                     \
                     "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" NAMES_##COUNT "}, %" A   \
                     ", %" B ", adds, 1, 1, 0, 0;\n}\n"                                                           \
                     : ALL_SUMS_##COUNT(sums)                                                                     \
                     : "l"(a), "l"(b), "r"(adds));                                                                \
    }
#define MULTIPLIES(N, COUNT, A, B, ADDS)                     \
    MULTIPLY(bfloat16, "bf16", N, COUNT, A, B, ADDS)         \
    MULTIPLY(float16, "f16", N, COUNT, A, B, ADDS)
MULTIPLIES("16", 8, "8", "9", "10")
MULTIPLIES("32", 16, "16", "17", "18")
MULTIPLIES("64", 32, "32", "33", "34")
MULTIPLIES("96", 48, "48", "49", "50")
MULTIPLIES("128", 64, "64", "65", "66")
#undef MULTIPLIES
#undef MULTIPLY

#endif
