// The order in which the warps of all blocks go through a chain of products (linear_chain.cu).
#pragma once

#include "small_linear_product.cuh"

constexpr int kMostLinks = 4;
constexpr int kMostParts = 72;  // a row's squares are added up by so many clusters at most

// A product. Of a norm before it x has only been given the weight: sums are divided by the root of each row's mean
// square, of which clusters have left parts with the product that made x.
struct Link {
    Task task;
    bool is_gated;
    const float* squares;  // [rows, kMostParts], or none: no norm before
    int num_parts, norm_width;
    float epsilon;
    const void* norm_weight;  // of the norm behind it, or none
    void* weighted;           // the result times that weight
    float* squares_to;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// How all blocks wait for each other, which are resident together. A block's clerk, a thread, speaks for it: it learns
// from its consumers that they have stored, tells the other blocks, hears of all and tells everybody in its block.
struct Meeting {
    unsigned stored, met;  // barriers in shared memory, of kConsumers arrivals and of one
    unsigned* arrivals;    // of all blocks; zero before the kernel, and after
    unsigned parity, target;

    __device__ void init() const {
        init_barrier(stored, kConsumers);
        init_barrier(met, 1);
    }

    // By all lanes of all consumers, before they hear.
    __device__ void say_stored() const {
        publish_global_writes();
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(stored);
    }

    __device__ void speak() {
        wait_for_phase(stored, parity);
        target += gridDim.x;
        count_arrival(arrivals);
        wait_for_arrivals(arrivals, target);
        publish_global_writes();
        arrive(met);
    }

    // What all blocks have stored is there.
    __device__ void hear() {
        wait_for_phase(met, parity);
        parity ^= 1;
    }

    // By the clerk. The last of those that wait for nobody any more leaves zero behind.
    __device__ void leave() const {
        if (count_leaving(arrivals) == target + gridDim.x - 1) *arrivals = 0;
    }
};

// One product after the other; all blocks meet in between.
template <typename Multiply, typename Meet>
__device__ __forceinline__ void follow(const Link* links, int num_links, const Multiply& multiply, const Meet& meet) {
#pragma unroll 1
    for (int i = 0; i < num_links; ++i) {
        const Link link = links[i];
        multiply(link);
        if (i + 1 < num_links) meet();
    }
}

#endif
