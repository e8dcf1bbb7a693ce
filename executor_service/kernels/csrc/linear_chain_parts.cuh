// Arithmetic of linear_chain on packs of eight elements, and a row's sum of squares.
#pragma once

#include "packs.cuh"

template <typename T> __device__ __forceinline__ float sum_of_squares(const unsigned (&words)[4]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low, high;
        split(words[i], low, high, T());
        sum += low * low;
        sum += high * high;
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void multiply_words(unsigned (&to)[4], const unsigned (&words)[4], const unsigned (&by)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low, high, low_factor, high_factor;
        split(words[i], low, high, T());
        split(by[i], low_factor, high_factor, T());
        to[i] = pair_of(low * low_factor, high * high_factor, T());
    }
}

// Of the first `count` of kMost parts, in the same order for all. The address is a multiple of 16.
template <int kMost> __device__ __forceinline__ float sum_of_parts(const float* parts, int count) {
    static_assert(kMost % 4 == 0);
    Pack<float, 4> packs[kMost / 4];
#pragma unroll
    for (int i = 0; i < kMost / 4; ++i)
        if (4 * i < count) packs[i] = load<float, 4>(parts + 4 * i);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
        if (i < count) sum += packs[i / 4].elements[i % 4];
    return sum;
}
