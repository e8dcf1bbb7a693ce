// What all kernels of prefill attention share: the softmax of scores that arrive tile by tile, and who sees whom.
//
// The tensor cores leave scores in registers so: of 16 rows a warp has, a thread (lane / 4 = g, lane % 4 = q) holds
// rows g and g + 8, and of every 8 columns those at 2q and 2q + 1: element 4j + 2r + e is row g + 8r, column 8j + 2q + e.
#pragma once
#include "asynchronous.cuh"
#include "numbers.cuh"

namespace prefill {

constexpr float kLog2E = 1.4426950408889634f;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two elements in one register, the first in the low half.
template <typename T> __device__ __forceinline__ unsigned pair(float low, float high);

template <> __device__ __forceinline__ unsigned pair<bfloat16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

template <> __device__ __forceinline__ unsigned pair<float16>(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// One request's chunk and the keys that a tile of its queries sees.
struct Chunk {
    int begin, count, length;
};

__device__ __forceinline__ Chunk chunk_of(const int* cu_seqlens, const int* seq_lens, int request) {
    const int begin = cu_seqlens[request];
    return {begin, cu_seqlens[request + 1] - begin, seq_lens[request]};
}

// The first key that the query at `position` sees.
__device__ __forceinline__ int first_key(int position, int window) {
    return window && position >= window ? position - window + 1 : 0;
}

// The last key that a query sees: itself; or with spans what is before its row's entry of `visible_ends`. Entries of a
// chunk never fall, so the last row of a tile sees the most.
template <bool kSpans>
__device__ __forceinline__ int last_key(const int* visible_ends, int row, int position) {
    return kSpans ? visible_ends[row] - 1 : position;
}

// How scores become exponents: softmax takes 2^(factor * (score - maximum)), after `cap` where there is one.
struct Scaling {
    float factor;  // of a score (of a capped one, if `inner` is not 0)
    float inner;   // scale / softcap * 2 log2(e), or 0
};

__device__ __forceinline__ Scaling scaling_of(float scale, float softcap) {
    if (softcap == 0.0f) return {scale * kLog2E, 0.0f};
    return {softcap * kLog2E, 2.0f * kLog2E * scale / softcap};
}

// tanh(score * scale / softcap), by its definition: absolutely as exact as float32 lets it be, which is what counts.
__device__ __forceinline__ float capped(float score, float inner) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_of(fminf(score * inner, 126.0f)));
}

template <int kCount> __device__ __forceinline__ void cap(float (&scores)[kCount], float inner) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores[i] = capped(scores[i], inner);
}

// Hides what rows may not see. `position` is that of the thread's first row, `key` the first of its columns. With spans
// the first row's entry of `visible_ends` is number `row`; what is from `end` on belongs to no row of the tile.
template <bool kSpans, int kCount>
__device__ __forceinline__ void mask(
    float (&scores)[kCount], int position, int key, int window, const int* visible_ends, int row, int end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int own = position + 8 * i - key;
        const int last = kSpans ? visible_ends[min(row + 8 * i, end - 1)] - 1 - key : own;
        const int before = window ? own - window : -(1 << 30);
#pragma unroll
        for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& score = scores[4 * j + 2 * i + e];
                if (8 * j + e > last || 8 * j + e <= before) score = minus_infinity();
            }
        }
    }
}

// A thread's two rows: the largest score so far, and its own share of the sum of exponentials.
struct Rows {
    float maximum[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.0f, 0.0f};
};

__device__ __forceinline__ float largest_of_four_lanes(float value) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
    return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

__device__ __forceinline__ float sum_of_four_lanes(float value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// What a tile's scores make of the largest ones so far: `shift` is to be subtracted from exponents, `corrections` are what
// earlier sums and outputs are worth then. They are 1 as long as no score exceeds the largest of earlier tiles by more
// than kSlack binary orders: nothing overflows by so little.
template <int kSlack, int kCount>
__device__ __forceinline__ void find_largest(
    const float (&scores)[kCount], Rows& rows, float factor, float (&shift)[2], float (&corrections)[2]) {
    float largest[2][2];  // two of each row, so that not every step waits for the one before
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i % 2][i / 2] = fmaxf(scores[2 * i], scores[2 * i + 1]);
#pragma unroll
    for (int i = 4; i < kCount / 2; ++i) {
        const int row = i % 2, chain = i / 2 % 2;
        largest[row][chain] = fmaxf(largest[row][chain], fmaxf(scores[2 * i], scores[2 * i + 1]));
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float most = fmaxf(rows.maximum[row], largest_of_four_lanes(fmaxf(largest[row][0], largest[row][1])));
        if (kSlack && (most - rows.maximum[row]) * factor <= kSlack) most = rows.maximum[row];
        // A row that has seen nothing yet keeps zeros: minus infinity less itself is no number.
        shift[row] = most == minus_infinity() ? 0.0f : most * factor;
        corrections[row] = most == rows.maximum[row] ? 1.0f : exp2_of((rows.maximum[row] - most) * factor);
        rows.maximum[row] = most;
    }
}

// Exponentials of the scores, added to their rows' sums and made the first operand of the next product: 16 columns are
// four registers.
template <typename T, int kCount>
__device__ __forceinline__ void exponentiate(
    const float (&scores)[kCount], Rows& rows, float factor, const float (&shift)[2], const float (&corrections)[2],
    unsigned (&weights)[kCount / 2]) {
    float sums[2][4] = {};
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
        const int row = i % 2, chain = i / 2 % 2 * 2;
        const float first = exp2_of(scores[2 * i] * factor - shift[row]);
        const float second = exp2_of(scores[2 * i + 1] * factor - shift[row]);
        sums[row][chain] += first;
        sums[row][chain + 1] += second;
        weights[i] = pair<T>(first, second);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row)
        rows.sum[row] = rows.sum[row] * corrections[row] +
                        ((sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]));
}

// The reciprocals of both rows' sums, which all lanes of a row know then.
__device__ __forceinline__ void reciprocals(const Rows& rows, float (&inverse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) inverse[row] = 1.0f / sum_of_four_lanes(rows.sum[row]);
}

template <int kCount> __device__ __forceinline__ void scale_rows(float (&out)[kCount], const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] *= factors[i / 2 % 2];
}

// 16 bytes from global to shared memory, zeros where not `valid`; sm_80's asynchronous copy.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace prefill
