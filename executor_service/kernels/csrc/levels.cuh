// uint8 levels to elements by a table of 256 values per channel.
//
// A table that rescaling and normalising make is a straight line, but for its last bits: in 16 bits it rounds to the
// very same elements as level * factor + summand does, as a rule. Where each of its 256 values does, the sum is used,
// for shared memory cannot give as many looked-up values as the memory takes elements; else the table itself.
#pragma once
#include "numbers.cuh"

namespace {

constexpr int kLevels = 256;

// Two levels of a word's low half, as floats: bytes under an exponent with which the last bit counts one.
__device__ __forceinline__ float first_level(unsigned word) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540)) - 8388608.0f;
}

__device__ __forceinline__ float second_level(unsigned word) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7541)) - 8388608.0f;
}

// The line through the ends of a channel's row of the table.
struct Line {
    float factor, summand;
};

__device__ __forceinline__ Line line_of(const float* row) {
    return {(row[kLevels - 1] - row[0]) * (1.0f / (kLevels - 1)), row[0]};
}

__device__ __forceinline__ float on(const Line& line, float level) {
    return __fmaf_rn(level, line.factor, line.summand);
}

// Stores `num_channels` rows of the table as elements, with all threads of a block; whether those that this thread
// stored lie on the lines.
template <typename T>
__device__ __forceinline__ bool store_table(const float* table, T* values, int num_channels) {
    bool is_line = true;
    for (int i = threadIdx.x; i < num_channels * kLevels; i += blockDim.x) {
        const float level = static_cast<float>(i % kLevels);
        const T value = from_float<T>(table[i]);
        values[i] = value;
        is_line &= rounded<T>(on(line_of(table + i / kLevels * kLevels), level)) == to_float(value);
    }
    return is_line;
}

}  // namespace
