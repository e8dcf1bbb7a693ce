// Arithmetic of linear_chain on packs of eight elements: norms, as rms_norm.cu rounds them.
#pragma once

#include "packs.cuh"

template <typename T> __device__ __forceinline__ Floats<8> floats_in(const unsigned (&words)[4]) {
    Floats<8> floats;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(words[i], floats.elements[2 * i], floats.elements[2 * i + 1], T());
    return floats;
}

template <typename T> __device__ __forceinline__ float sum_of_squares(const unsigned (&words)[4]) {
    const Floats<8> x = floats_in<T>(words);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.elements[i] * x.elements[i];
    return sum;
}

// Rounded before the weight, as the models that transformers has do it.
template <typename T>
__device__ __forceinline__ void normalize(unsigned (&words)[4], const unsigned (&factors)[4], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low, high, low_factor, high_factor;
        split(words[i], low, high, T());
        split(pair_of(low * scale, high * scale, T()), low, high, T());
        split(factors[i], low_factor, high_factor, T());
        words[i] = pair_of(low * low_factor, high * high_factor, T());
    }
}

__device__ __forceinline__ float scale_of(float mean_square, float epsilon) { return rsqrtf(mean_square + epsilon); }

// Of eight lanes side by side, in the same order for all.
__device__ __forceinline__ float sum_of_eight(float value) {
#pragma unroll
    for (int offset = 4; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}
