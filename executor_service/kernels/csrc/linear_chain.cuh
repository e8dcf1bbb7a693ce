// The order in which the warps of all blocks go through a chain of products (linear_chain.cu).
#pragma once

#include "small_linear_product.cuh"

constexpr int kMostLinks = 4;

// A product, and the norm of its result that the next one takes, if any.
struct Link {
    Task task;
    bool is_gated;
    const void* norm_weight;
    void* normal;  // none: no norm
    float epsilon;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// How all blocks wait for each other, which are resident together. A block's clerk, a thread, speaks for it: it learns
// from its consumers that they have stored, tells the other blocks, hears of all and tells its consumers.
struct Meeting {
    unsigned stored, met;  // barriers in shared memory, of kConsumers arrivals and of one
    unsigned* arrivals;    // of all blocks; zero before the kernel, and after
    unsigned parity, target;

    __device__ void init() const {
        init_barrier(stored, kConsumers);
        init_barrier(met, 1);
    }

    // By all lanes of all consumers; what the others have stored is there.
    __device__ void meet_as_consumer() {
        publish_global_writes();
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(stored);
        wait_for_phase(met, parity);
        parity ^= 1;
    }

    __device__ void meet_as_clerk() {
        wait_for_phase(stored, parity);
        target += gridDim.x;
        count_arrival(arrivals);
        wait_for_arrivals(arrivals, target);
        publish_global_writes();
        arrive(met);
        parity ^= 1;
    }

    // The last of those that wait for nobody any more leaves zero behind.
    __device__ void leave() const {
        if (count_leaving(arrivals) == target + gridDim.x - 1) *arrivals = 0;
    }
};

// One after the other: a product, perhaps the norm of its result, and what comes next. All blocks meet in between.
template <typename Multiply, typename Normalize, typename Meet>
__device__ __forceinline__ void follow(
    const Link* links, int num_links, const Multiply& multiply, const Normalize& normalize, const Meet& meet) {
#pragma unroll 1
    for (int i = 0; i < num_links; ++i) {
        const Link link = links[i];
        multiply(link);
        if (link.normal) {
            meet();
            normalize(link);
        }
        if (i + 1 < num_links) meet();
    }
}

#endif
