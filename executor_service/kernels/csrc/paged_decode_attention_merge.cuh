// Partial results of items that several blocks share: whoever writes the last one adds all up.
#pragma once

#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_plan.cuh"
#include "paged_decode_attention_walk.cuh"

namespace {

constexpr int kMaxItems = 1 << 16;
constexpr int kMaxPending = 12;

// Leaves of each item that have been written as partial results; whoever writes the last one sets it to zero again.
__device__ unsigned num_written[kMaxItems];

// An item of which a range has `leaves`, but not all.
struct Pending {
    int request, kv_head, head, length, base, lane, leaves;
};

template <typename T, int kDim, int kWarps> struct Merge {
    static constexpr int kPartial = kDim + 4;  // floats of one head's partial result: sums, maximum, sum, two unused

    const Inputs<T>& in;
    const Pending* pending;
    const Line& line;
    int group, slices;
    int thread, lane, warp;

    template <typename Item> __device__ __forceinline__ int heads_of(const Item& of) const {
        return min(kHeads, (of.kv_head + 1) * group - of.head);
    }

    template <typename Item> __device__ __forceinline__ T* out_of(const Item& of) const {
        return in.out + (static_cast<long long>(of.request) * in.num_heads + of.head) * kDim;
    }

    // Where a range writes its partial results.
    __device__ __forceinline__ float* slot(int of_range, int number) const {
        return in.partials +
               (static_cast<long long>(of_range) * (kMaxLeaves + 1) + number) * min(kHeads, group) * kPartial;
    }

    // After a barrier: says that the partial results of `count` pending items are written; who says so last for an item
    // adds up its leaves.
    __device__ __forceinline__ void finish(int count) const {
        __shared__ int slots[kMaxPending][kMaxLeaves], counts[kMaxPending];
        __shared__ bool is_last[kMaxPending];
        const bool is_mine = thread < count && arrive(pending[thread]);
#pragma unroll 1
        for (int i = (warp + kWarps - 1) % kWarps; i < count; i += kWarps) list_slots(pending[i], slots[i], counts[i]);
        if (thread < count) is_last[thread] = is_mine;
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < count; ++i)
            if (is_last[i]) merge(pending[i], slots[i], counts[i]);
        __syncthreads();
    }

    // Whether the item's other leaves were there before.
    __device__ __forceinline__ bool arrive(const Pending& of) const {
        const int of_kv_head = (of.head - of.kv_head * group) / kHeads;
        unsigned* count = num_written + (of.request * in.num_kv_heads + of.kv_head) * slices + of_kv_head;
        const int all = span_of<16 * kWarps>(of.length, in.window).leaves;
        fence();
        const bool is_last = atomicAdd(count, of.leaves) + of.leaves == all;
        if (is_last) *count = 0;
        fence();
        return is_last;
    }

    // Where the partial results of an item are, in the order of its leaves; a lane looks for one leaf's.
    __device__ __forceinline__ void list_slots(const Pending& of, int* slots, int& count) const {
        const Span of_item = span_of<16 * kWarps>(of.length, in.window);
        const int leaf_of_lane = min(lane, of_item.leaves - 1);
        const int owner = piece_of(leaf_of_lane, of.base, of_item, line);
        const int number = slot_of(leaf_of_lane, owner, of.base, of_item, line);
        const bool is_used = lane < of_item.leaves && (number > 0 || lane == 0);
        const unsigned used = __ballot_sync(0xffffffffu, is_used);
        if (is_used)
            slots[__popc(used & ((1u << lane) - 1))] =
                (owner * in.num_lanes + of.lane) * (kMaxLeaves + 1) + number;
        if (lane == 0) count = __popc(used);
    }

    // A warp takes a head, a lane kEach of its dimensions. Folds as close_leaf does; all factors are known before the
    // sums are, from the maxima so far.
    __device__ __forceinline__ void merge(const Pending& of, const int* slots, int count) const {
        constexpr int kEach = kDim / 32;
        const int heads = heads_of(of), stride = min(kHeads, group) * kPartial;
#pragma unroll 1
        for (int head = warp; head < heads; head += kWarps) {
            const float* from = in.partials + head * kPartial;
            const float* own = from + static_cast<long long>(slots[min(lane, count - 1)]) * stride + kDim;
            const Pack<float, 2> own_stats = load_past_l1<2>(own);
            Pack<float, kEach> parts[kMaxLeaves], sums = {};
#pragma unroll
            for (int k = 0; k < kMaxLeaves; ++k)
                parts[k] = load_past_l1<kEach>(
                    from + static_cast<long long>(slots[min(k, count - 1)]) * stride + lane * kEach);
            float kept = 0.0f, added = 1.0f, sum = 0.0f;
            factors_of(own_stats.elements[0], kept, added);
#pragma unroll
            for (int k = 0; k < kMaxLeaves; ++k) {
                const float kept_k = __shfl_sync(0xffffffffu, kept, k);
                const float added_k = __shfl_sync(0xffffffffu, added, k);
                const float sum_k = __shfl_sync(0xffffffffu, own_stats.elements[1], k);
                if (k >= count) continue;
                sum = folded(sum, kept_k, sum_k, added_k);
#pragma unroll
                for (int e = 0; e < kEach; ++e)
                    sums.elements[e] = folded(sums.elements[e], kept_k, parts[k].elements[e], added_k);
            }
            const float factor = __frcp_rn(sum);
            Pack<T, kEach> result;
#pragma unroll
            for (int e = 0; e < kEach; ++e) result.elements[e] = from_float<T>(sums.elements[e] * factor);
            store<T, kEach>(out_of(of) + head * kDim + lane * kEach, result);
        }
    }

    // What is kept of the sums of all lanes before this one, and what is added of its own.
    __device__ __forceinline__ void factors_of(float own_max, float& kept, float& added) const {
        float maximum = own_max;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const float other = __shfl_up_sync(0xffffffffu, maximum, offset);
            if (lane >= offset) maximum = fmaxf(maximum, other);
        }
        const float before = __shfl_up_sync(0xffffffffu, maximum, 1);
        if (lane == 0) return;
        const Fold fold(before, own_max);
        kept = fold.kept, added = fold.added;
    }
};

}  // namespace
