// How the sums of a block's warps become results of paged_decode_attention: those over a chunk are added up over warps,
// then along the tree of chunks, and where an item has several units, their partial results once all are written.
#pragma once

#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_clerk.cuh"
#include "paged_decode_attention_units.cuh"

namespace {

// Where dimension `dim` of a head lies among a warp's sums: such that lanes that write together meet different banks.
template <int kDim> __device__ __forceinline__ int place_in_sums(int head, int dim) {
    return head * kDim + (dim ^ head / 2 * 8);
}

// Four dimensions of values, weighted by exponentials relative to `maximum`, and the sum of the weights.
struct Total {
    Pack<float, 4> values{};
    float maximum = lowest(), sum = 0.0f;

    // What is added is relative to a maximum of its own; nothing, where that is the lowest number.
    __device__ __forceinline__ void add(const Pack<float, 4>& other, float other_maximum, float other_sum) {
        const float higher = fmaxf(maximum, other_maximum), zero = higher == lowest() ? 0.0f : higher;
        const float kept = exp2_of(maximum - zero), added = exp2_of(other_maximum - zero);
        maximum = higher;
        sum = __fmaf_rn(other_sum, added, __fmul_rn(sum, kept));
#pragma unroll
        for (int e = 0; e < 4; ++e)
            values.elements[e] = __fmaf_rn(other.elements[e], added, __fmul_rn(values.elements[e], kept));
    }

    __device__ __forceinline__ void add(const Total& other) { add(other.values, other.maximum, other.sum); }
};

// The left halves of a tree that wait for their right ones.
struct Tree {
    Total halves[kLevels];

    // Leaf `number`, or what grows from it and those before; of the last one, all there is.
    __device__ __forceinline__ void add(Total& total, int number, bool is_last) {
        bool waits = false;
#pragma unroll
        for (int level = 0; level < kLevels; ++level) {
            if (waits) continue;
            if (number >> level & 1) {
                halves[level].add(total);
                total = halves[level];
            } else if (!is_last) {
                halves[level] = total;
                waits = true;
            }
        }
    }
};

template <typename T, int kDim, int kWarps> struct Results {
    static constexpr int kMergedAtOnce = 4, kThreads = 32 * kWarps;
    static constexpr int kTotals = (kHeads * (kDim / 4) + kThreads - 1) / kThreads;  // of a unit, for each thread
    static constexpr int kPartial = kDim + 4;  // floats of one head's partial result: sums, maximum, sum, two unused

    const Inputs<T>& in;
    const Board<kWarps>& board;
    int thread;
    Tree trees[kTotals];

    // The sums of all warps over chunk `chunk` of a unit, in order; all chunks' as a tree. The first warp's sums lie at
    // `left`, the others' `apart` bytes further each.
    __device__ __forceinline__ void combine(
        const Unit& unit, int chunk, bool is_last, const unsigned char* left, int apart) {
#pragma unroll
        for (int i = 0; i < kTotals; ++i) {
            const int at = thread + i * kThreads, head = at / (kDim / 4), dim = at % (kDim / 4) * 4;
            if (head >= unit.heads) continue;
            Total total;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float* part = reinterpret_cast<const float*>(left + w * apart) + place_in_sums<kDim>(head, dim);
                total.add(load<float, 4>(part), board.maxima[w][head], board.sums[w][head]);
            }
            trees[i].add(total, chunk, is_last);
            if (is_last) leave(unit, head, dim, total);
        }
    }

    __device__ __forceinline__ void leave(const Unit& unit, int head, int dim, const Total& total) const {
        if (unit.places == 1)
            write(unit, head, dim, total);
        else
            write_partial(partial_of(unit, unit.place) + head * kPartial, dim, total);
    }

    // The partial results of all units of an item: what is left of the trees, and these in order.
    __device__ __forceinline__ void merge(const Unit& unit) const {
#pragma unroll 1
        for (int i = thread; i < unit.heads * (kDim / 4); i += kThreads) {
            const int head = i / (kDim / 4), dim = i % (kDim / 4) * 4;
            Total total;
            Tree tree;
#pragma unroll 1
            for (int first = 0; first < unit.places; first += kMergedAtOnce) {
                Total parts[kMergedAtOnce];
                read_partials(unit, first, head, dim, parts);
#pragma unroll
                for (int k = 0; k < kMergedAtOnce; ++k) {
                    const int place = first + k, number = place & (unit.each - 1);
                    if (place >= unit.places) continue;
                    const bool is_last = number == unit.each - 1 || place == unit.places - 1;
                    tree.add(parts[k], number, is_last);
                    if (is_last) total.add(parts[k]);
                }
            }
            write(unit, head, dim, total);
        }
    }

    // From unit `first` of an item on; the last one again, where there are no more.
    __device__ __forceinline__ void read_partials(
        const Unit& unit, int first, int head, int dim, Total (&parts)[kMergedAtOnce]) const {
        Pack<float, 4> values[kMergedAtOnce], about[kMergedAtOnce];
#pragma unroll
        for (int k = 0; k < kMergedAtOnce; ++k) {
            const float* part = partial_of(unit, min(first + k, unit.places - 1)) + head * kPartial;
            values[k] = load_past_l1(part + dim);
            about[k] = load_past_l1(part + kDim);
        }
#pragma unroll
        for (int k = 0; k < kMergedAtOnce; ++k) parts[k] = {values[k], about[k].elements[0], about[k].elements[1]};
    }

    // Unit `place` of the unit's item.
    __device__ __forceinline__ float* partial_of(const Unit& unit, int place) const {
        const int id = unit.id + (place - unit.place) * in.passes;
        return in.partials + static_cast<long long>(id) * min(kHeads, in.group) * kPartial;
    }

    __device__ __forceinline__ void write_partial(float* to, int dim, const Total& total) const {
        store(to + dim, total.values);
        if (dim == 0) store(to + kDim, Pack<float, 4>{total.maximum, total.sum, 0.0f, 0.0f});
    }

    // With a zero added, so that none is negative: the only difference that adding nothing to a result can make.
    __device__ __forceinline__ void write(const Unit& unit, int head, int dim, const Total& total) const {
        const float factor = __frcp_rn(total.sum);
        Pack<T, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e) pack.elements[e] = from_float<T>(__fmaf_rn(total.values.elements[e], factor, 0.0f));
        store(in.out + (static_cast<long long>(unit.request) * in.num_heads() + unit.head + head) * kDim + dim, pack);
    }
};

}  // namespace
