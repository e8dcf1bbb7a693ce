// What small_linear is built of: barriers in shared memory that bulk copies complete, a ring of stages between them,
// and the tensor cores' instruction.
#pragma once

#include "numbers.cuh"

// As silu_mul has it.
template <typename T> __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <> __device__ __forceinline__ float silu<float>(float x) { return x / (1.0f + expf(-x)); }

#if __CUDA_ARCH__ >= 900

// Addresses of the shared window are 32 bits wide in PTX.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(unsigned barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all init_barrier and before the __syncthreads that shows them: copies must see them as well.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// All lanes of a warp have read: one arrives for all. Without the fence an arrival overtakes loads that have not
// returned yet, and the next copy overwrites what they were to read (seen with many loads from memory under way).
__device__ __forceinline__ void release(unsigned barrier) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}

// Arrives, and lets the phase end only once copies have brought so many bytes.
__device__ __forceinline__ void arrive_expecting(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns when the barrier's phase of this parity has ended.
__device__ __forceinline__ void wait_for_phase(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
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

// For data that is read once: it leaves the L2 cache first.
__device__ __forceinline__ unsigned long long read_once_policy() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// For data that all blocks read: it leaves the L2 cache last.
__device__ __forceinline__ unsigned long long keep_policy() {
    unsigned long long policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
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
