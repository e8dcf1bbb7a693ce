// How the work of paged_decode_attention is cut into units.
//
// A unit is a chunk of a request's visible tokens and a pass: up to eight query heads of one KV head. How long chunks are
// depends on the request alone, so its result does not depend on who else is in the batch, nor on the GPU's size. Units
// are numbered pass by pass, then chunk by chunk, then request by request: those that are worked on at the same time
// read the same tokens' rows of all heads, whole pieces of memory.
#pragma once

#include "numbers.cuh"
#include "paged_decode_attention.cuh"

namespace {

constexpr int kHeads = 8;      // query heads of one pass: the width of a matrix product
constexpr int kMostTiles = 32;  // of a chunk: each lane of a warp looks up one

template <typename T> struct Inputs {
    const T* query;
    const T* keys;
    const T* values;
    const int* block_tables;
    const int* lengths;
    T* out;
    float* partials;
    int batch, num_kv_heads, group, passes;  // query heads of a KV head, and passes of all
    int block_shift, table_stride;
    float scale, softcap;
    int window;
    int least_shift, most_bits;  // of chunks: 2^least_shift tiles at least, 2^most_bits of a request, as far as that goes

    __device__ __forceinline__ int num_heads() const { return num_kv_heads * group; }
};

// The part of a request that its query sees: tokens [start, length), in tiles that begin at `first`, and chunks of
// 2^shift tiles.
struct Span {
    int start, first, tiles, shift, chunks;
};

// Chunk `chunk` of `chunks` of an item, which is a request and a pass; `head` is the first of its `heads` query heads.
// Its tokens begin at `token`; of the request's, [start, length) are seen. No unit: tiles is 0.
struct alignas(16) Unit {
    int request, kv_head, head, heads;
    int token, start, length, tiles;
    int id, item, chunk, chunks;
};

__device__ __forceinline__ int sum_up_to(int value, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, value, offset);
        if (lane >= offset) value += other;
    }
    return value;
}

// A warp's way from a unit's number to the unit. A lane knows how many units come before its `each` requests.
template <typename T, int kTile> struct Units {
    const Inputs<T>& in;
    int lane, each, before, total, first_length;

    __device__ __forceinline__ Units(const Inputs<T>& inputs, int of_lane)
        : in(inputs), lane(of_lane), each((in.batch + 31) / 32) {
        int mine = 0;
#pragma unroll 4
        for (int i = 0; i < each; ++i) {
            const int request = lane * each + i;
            const int length = request < in.batch ? load_past_l1(in.lengths + request) : 0;
            if (i == 0) first_length = length;
            mine += in.passes * span_of(length).chunks;
        }
        const int up_to = sum_up_to(mine, lane);
        before = up_to - mine;
        total = __shfl_sync(kAllLanes, up_to, 31);
    }

    __device__ __forceinline__ Span span_of(int length) const {
        Span span;
        span.start = in.window > 0 && length > in.window ? length - in.window : 0;
        span.first = span.start & ~15;
        span.tiles = length > 0 ? (length - span.first + kTile - 1) / kTile : 0;
        const int bits = 32 - __clz(max(span.tiles - 1, 0));
        span.shift = min(max(bits - in.most_bits, in.least_shift), 5);
        span.chunks = (span.tiles + (1 << span.shift) - 1) >> span.shift;
        return span;
    }

    // All lanes ask for, and get, the same.
    __device__ __forceinline__ Unit find(int id) const {
        Unit unit{};
        if (id >= total) return unit;
        const int group = 31 - __clz(__ballot_sync(kAllLanes, before <= id));
        int base = __shfl_sync(kAllLanes, before, group), length;
        unit.request = group * each;
        if (each == 1)
            length = __shfl_sync(kAllLanes, first_length, group);
        else
            length = find_among(unit.request, base, id);
        const Span span = span_of(length);
        unit.chunk = (id - base) / in.passes, unit.chunks = span.chunks;
        const int pass = id - base - unit.chunk * in.passes;
        // A pass has up to kHeads heads of one KV head: which, is known from how many passes there are of each.
        unit.kv_head = in.group <= kHeads ? pass : pass / ((in.group + kHeads - 1) / kHeads);
        const int first = pass - unit.kv_head * ((in.group + kHeads - 1) / kHeads);
        unit.head = unit.kv_head * in.group + first * kHeads;
        unit.heads = min(kHeads, (unit.kv_head + 1) * in.group - unit.head);
        unit.token = span.first + ((unit.chunk * kTile) << span.shift);
        unit.start = span.start, unit.length = length;
        unit.tiles = min(1 << span.shift, span.tiles - (unit.chunk << span.shift));
        unit.id = id, unit.item = unit.request * in.passes + pass;
        return unit;
    }

    // Among a lane's requests, from `request` on, whose units begin at `base`: both become those of the unit's request.
    __device__ __forceinline__ int find_among(int& request, int& base, int id) const {
        const int end = min(request + each, in.batch);
#pragma unroll 1
        for (;; request += 32) {
            const int length = request + lane < end ? load_past_l1(in.lengths + request + lane) : 0;
            const int mine = in.passes * span_of(length).chunks, up_to = base + sum_up_to(mine, lane);
            const unsigned beyond = __ballot_sync(kAllLanes, up_to > id);
            base = __shfl_sync(kAllLanes, up_to - (beyond ? mine : 0), beyond ? __ffs(beyond) - 1 : 31);
            if (!beyond) continue;
            request += __ffs(beyond) - 1;
            return __shfl_sync(kAllLanes, length, __ffs(beyond) - 1);
        }
    }
};

}  // namespace
