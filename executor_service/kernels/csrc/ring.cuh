// A ring of stages in shared memory, between barriers that copies complete.
#pragma once

#include "asynchronous.cuh"

#if __CUDA_ARCH__ >= 900

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
    __device__ void init(int readers) const {
        for (int i = 0; i < stages; ++i) {
            init_barrier(full + 8 * i, 1);
            init_barrier(empty + 8 * i, readers);
        }
    }
};

#endif
