// What small_linear is built of: bulk copies, a ring of stages between barriers that they complete, and the tensor
// cores' instruction.
#pragma once

#include "asynchronous.cuh"
#include "numbers.cuh"

// As silu_mul has it.
template <typename T> __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <> __device__ __forceinline__ float silu<float>(float x) { return x / (1.0f + expf(-x)); }

#if __CUDA_ARCH__ >= 900

// After all init_barrier and before the __syncthreads that shows them: copies must see them as well.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_shared_writes();
}

// All lanes of a warp have read: one arrives for all. Without the fence an arrival overtakes loads that have not
// returned yet, and the next copy overwrites what they were to read (seen with many loads from memory under way).
__device__ __forceinline__ void release(unsigned barrier) {
    publish_shared_writes();
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}

// True for one lane of the warp, all of whose lanes come here together.
__device__ __forceinline__ bool elect() {
    unsigned is_elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}\n" : "=r"(is_elected));
    return is_elected;
}

// Both addresses and the size are multiples of 16 bytes.
__device__ __forceinline__ void copy(
    unsigned to, const void* from, unsigned bytes, unsigned barrier, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// 16 bytes that others may have written before wait_for_previous, so not before it and not from a cache for constants.
__device__ __forceinline__ void load_words(unsigned (&to)[4], const void* from) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from) : "memory");
}

__device__ __forceinline__ void load_shared_words(unsigned (&to)[4], unsigned from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// Barriers and stages of a ring; `full` ends when copies have come, `empty` when all consumers have read.
struct Ring {
    unsigned data, stride, full, empty;
    int stages, stage;
    unsigned parity;

    __device__ unsigned here() const { return data + stage * stride; }
    __device__ unsigned full_here() const { return full + 8 * stage; }
    __device__ unsigned empty_here() const { return empty + 8 * stage; }
    __device__ void advance() {
        if (++stage < stages) return;
        stage = 0;
        parity ^= 1;
    }
    __device__ void init(int arrivals) const {
        for (int i = 0; i < stages; ++i) {
            init_barrier(full + 8 * i, 1);
            init_barrier(empty + 8 * i, arrivals);
        }
    }
};

// sums[16][8] += a[16][16] b[16][8], fragments as in the PTX manual's m16n8k16.
template <typename T>
__device__ __forceinline__ void multiply_add(
    float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);

#define MULTIPLY_ADD(T, NAME)                                                                                        \
    template <>                                                                                                      \
    __device__ __forceinline__ void multiply_add<T>(                                                                 \
        float (&sums)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {            \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                          \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                    \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                        \
    }
MULTIPLY_ADD(float16, "f16")
MULTIPLY_ADD(bfloat16, "bf16")
#undef MULTIPLY_ADD

#endif
