// What paged_decode_attention asks of the hardware, from sm_80 on: asynchronous copies, fragments, matrix products.
#pragma once

#include "asynchronous.cuh"
#include "numbers.cuh"

constexpr unsigned kAllLanes = 0xffffffffu;

// Copies 16 bytes past the L1 cache, or writes zeros if not `is_there`: then nothing is read.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool is_there, unsigned long long policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
                 ::"r"(to), "l"(from), "r"(is_there ? 16 : 0), "l"(policy) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_shared(unsigned (&to)[4], unsigned from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void store_shared(unsigned to, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

// Four 8x8 matrices of 16-bit elements, transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// An 8x8 matrix of 16-bit elements whose rows four lanes each hold.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
    unsigned other;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
    return other;
}

// sum [16, 8] += a [16, 16] * b [16, 8].
template <typename T>
__device__ __forceinline__ void multiply_add(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b_low, unsigned b_high);

template <>
__device__ __forceinline__ void multiply_add<bfloat16>(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b_low, unsigned b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b_low), "r"(b_high));
}

template <>
__device__ __forceinline__ void multiply_add<float16>(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b_low, unsigned b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b_low), "r"(b_high));
}

template <typename T> __device__ __forceinline__ unsigned pair_of(float low, float high);

template <> __device__ __forceinline__ unsigned pair_of<bfloat16>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <> __device__ __forceinline__ unsigned pair_of<float16>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Loads past the L1 cache: of what others have written since this kernel began, or before it.
__device__ __forceinline__ int load_past_l1(const int* from) {
    int to;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(to) : "l"(from) : "memory");
    return to;
}

__device__ __forceinline__ void load_past_l1(unsigned (&to)[4], const void* from) {
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from) : "memory");
}

__device__ __forceinline__ Pack<float, 4> load_past_l1(const float* from) {
    Pack<float, 4> to;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to.elements[0]), "=f"(to.elements[1]), "=f"(to.elements[2]), "=f"(to.elements[3])
                 : "l"(from) : "memory");
    return to;
}

// What the block has written before its barrier is visible to those who see a write after this, and the other way.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// A barrier of a block's first kThreads threads.
template <int kThreads> __device__ __forceinline__ void meet_first() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

__device__ __forceinline__ float lowest() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Off by about the last bit of 1, wherever x is.
__device__ __forceinline__ float tanh_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(exp2_of(2.8853900817779268f * x) + 1.0f));
    return 1.0f - 2.0f * y;
}
