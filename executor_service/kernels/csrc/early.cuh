// What a kernel may do before `wait_for_previous`: bring bytes to the L2 cache, which all multiprocessors share. Whoever
// still writes them does so there, so nothing is stale later; nothing is read yet. Worth it for what the kernel before
// does not write. Nothing is done before sm_90, where kernels do not begin early.
#pragma once

// `bytes` and the address are multiples of 16.
__device__ __forceinline__ void bring_near(const void* from, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// The cache line of an address.
__device__ __forceinline__ void bring_near(const void* from) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
#endif
}
