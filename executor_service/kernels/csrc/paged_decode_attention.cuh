// What paged_decode_attention asks of the hardware, from sm_80 on: asynchronous copies, fragments, matrix products.
#pragma once

#include "numbers.cuh"

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    unsigned long long address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return static_cast<unsigned>(address);
}

// Copies 16 bytes past the L1 cache, or writes zeros if not `is_there`: then nothing is read.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_word_async(unsigned to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row));
}

// sum [16, 8] += a [16, 16] * b [16, 8].
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high);

template <>
__device__ __forceinline__ void multiply_add<bfloat16>(
    float (&sum)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

template <>
__device__ __forceinline__ void multiply_add<float16>(
    float (&sum)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
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

// What other blocks have written, past the L1 cache.
template <int kCount> __device__ __forceinline__ Pack<float, kCount> load_past_l1(const float* from) {
    Pack<float, kCount> to;
    if constexpr (kCount == 4)
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(to.elements[0]), "=f"(to.elements[1]), "=f"(to.elements[2]), "=f"(to.elements[3])
                     : "l"(from));
    else if constexpr (kCount == 2)
        asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(to.elements[0]), "=f"(to.elements[1]) : "l"(from));
    else
        asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(to.elements[0]) : "l"(from));
    return to;
}

// What the block has written before its barrier is visible to those who see a write after this, and the other way.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

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

// Sums of exponentials relative to different maxima are added so, everywhere: the same numbers give the same bits,
// wherever they are added.
struct Fold {
    float maximum, kept, added;

    __device__ __forceinline__ Fold(float old_maximum, float new_maximum)
        : maximum(fmaxf(old_maximum, new_maximum)),
          kept(exp2_of(old_maximum - maximum)),
          added(exp2_of(new_maximum - maximum)) {}
};

__device__ __forceinline__ float folded(float old_sum, float kept, float new_sum, float added) {
    return __fmaf_rn(new_sum, added, __fmul_rn(old_sum, kept));
}
