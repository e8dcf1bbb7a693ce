// How the work of paged_decode_attention is divided: whole-number arithmetic alone.
//
// An item is one request and one pass (a KV head with up to eight of its query heads). Its tokens are cut into tiles of
// kTile, and those into at most kMaxLeaves leaves of 2^leaf_shift tiles: a cut that depends on the request's own length
// and on nothing else. The tiles of all items stand in one line; worker w of G gets what lies between w/G and (w+1)/G of
// it, both bounds moved to the nearest leaf. So every worker reads the same amount, give or take a leaf, and what a leaf
// adds to the result does not depend on who computes it.
#pragma once

constexpr int kMaxLeaves = 32;

__device__ __forceinline__ int num_bits(unsigned x) { return 32 - __clz(x); }

// The part of a request that its query sees: tokens [start, length), in tiles that begin at `first`.
struct Span {
    int start, first, tiles, leaf_shift, leaves;
};

template <int kTile> __device__ __forceinline__ Span span_of(int length, int window) {
    Span span;
    span.start = window > 0 && length > window ? length - window : 0;
    span.first = span.start & ~15;
    span.tiles = length > 0 ? (length - span.first + kTile - 1) / kTile : 0;
    const int bits = span.tiles > 0 ? num_bits(span.tiles - 1) : 0;
    span.leaf_shift = bits > num_bits(kMaxLeaves - 1) ? bits - num_bits(kMaxLeaves - 1) : 0;
    span.leaves = (span.tiles + (1 << span.leaf_shift) - 1) >> span.leaf_shift;
    return span;
}

// The leaf that begins nearest to tile `at` of an item; span.leaves where that is the item's end.
__device__ __forceinline__ int nearest_leaf(int at, const Span& span) {
    return (at + ((1 << span.leaf_shift) >> 1)) >> span.leaf_shift;
}

// Where worker's share begins, before it is moved to a leaf.
__device__ __forceinline__ int share_begin(int worker, int num_workers, int total) {
    return static_cast<int>(static_cast<unsigned long long>(worker) * total / num_workers);
}

// The worker that computes leaf `leaf` of the item whose tiles begin at `base`.
__device__ __forceinline__ int worker_of(int leaf, int base, const Span& span, int num_workers, int total) {
    const int size = 1 << span.leaf_shift;
    // The last tile at which a share may begin that still moves to this leaf or to one before it.
    const int last = min(((leaf + 1) << span.leaf_shift) - size / 2 - 1, span.tiles - 1);
    const auto bound = static_cast<unsigned long long>(base + last + 1) * num_workers;
    return static_cast<int>((bound - 1) / total);
}

// Where a leaf's partial result lies among its worker's: 0 is for all leaves that a worker took from an item's begin on,
// 1 + k for the k-th leaf of the item in whose middle it began.
__device__ __forceinline__ int slot_of(int leaf, int worker, int base, const Span& span, int num_workers, int total) {
    const int begin = share_begin(worker, num_workers, total);
    const int first_leaf = begin > base ? nearest_leaf(begin - base, span) : 0;
    return first_leaf == 0 ? 0 : 1 + leaf - first_leaf;
}
