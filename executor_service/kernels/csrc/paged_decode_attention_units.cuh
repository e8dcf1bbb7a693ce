// How the work of paged_decode_attention is cut into units.
//
// An item is a request and a pass: up to eight query heads of one KV head. Its visible tokens are cut into chunks, how
// long ones depends on the request alone. Sums over chunks are added up as a tree over each eight of them, and these in
// order. A unit is a subtree: 1, 2, 4 or 8 chunks, by how much work there is, and its root is what it leaves to be
// added up. So an item's result depends neither on who else is in the batch nor on the GPU's size, whatever its units
// are.
//
// Units are numbered pass by pass, then along the tokens, then request by request: those that are worked on at the same
// time read the same tokens' rows of all heads, whole pieces of memory. Where there are many, they become smaller towards
// the last requests, so that all blocks of threads end at about the same time.
#pragma once

#include "numbers.cuh"
#include "paged_decode_attention.cuh"

namespace {

constexpr int kHeads = 8;       // query heads of one pass: the width of a matrix product
constexpr int kMostTiles = 32;  // of a unit: each lane of a warp looks up one
constexpr int kLevels = 3;      // of a tree
constexpr int kEven = 4;        // a bit beside the level
constexpr int kManyHeads = 4;   // of a pass, whose partial results take a while to add up
constexpr int kManyUnits = 4;   // of a block of threads: of fewer, smaller ones cost more than they even out

// Units become larger than a chunk, twice as large with every level, only if every block of threads still gets so many
// of them: so many halves. As measured (docs/notes/paged_decode_attention.md).
__device__ __forceinline__ int least_halves(int level, int group) {
    if (group < kManyHeads) return 16;
    return level == 1 ? 3 : level == 2 ? 8 : 16;
}

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
    int least_shift, most_bits;  // of chunks: 2^least_shift tiles at least, at most 2^most_bits as far as that goes

    __device__ __forceinline__ int num_heads() const { return num_kv_heads * group; }
};

// The part of a request that its query sees: tokens [start, length), in tiles that begin at `first`, chunks of
// 2^chunk_shift of them, and units of 2^unit_shift.
struct Span {
    int start, first, tiles, chunk_shift, unit_shift, units;
};

// Unit `place` of the `places` of an item; `each` make a whole tree. `head` is the first of its `heads` query heads.
// Its tokens begin at `token`; of the request's, [start, length) are seen. No unit: tiles is 0.
struct alignas(16) Unit {
    int request, kv_head, head, heads;
    int token, start, length, tiles;
    int id, item, place, places;
    int chunk_tiles, each;
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
    int lane, each, level, before, total, first_length;  // with kEven in `level`, if all units are of that level

    __device__ __forceinline__ Units(const Inputs<T>& inputs, int of_lane, int num_blocks)
        : in(inputs), lane(of_lane), each((in.batch + 31) / 32), level(0) {
        int counts[kLevels + 1] = {};  // of this lane's units, by how coarse they are
#pragma unroll 4
        for (int i = 0; i < each; ++i) {
            const int request = lane * each + i, length = length_of(request, in.batch);
            if (i == 0) first_length = length;
#pragma unroll
            for (int l = 0; l <= kLevels; ++l) counts[l] += in.passes * span_of(length, level_of(request, l)).units;
        }
        int up_to = sum_up_to(counts[0], lane);
        before = up_to - counts[0];
        total = __shfl_sync(kAllLanes, up_to, 31);
#pragma unroll
        for (int l = 1; l <= kLevels; ++l) {
            up_to = sum_up_to(counts[l], lane);
            const int fewer = __shfl_sync(kAllLanes, up_to, 31);
            if (2 * fewer < least_halves(l, in.group) * num_blocks) continue;
            before = up_to - counts[l], total = fewer, level = l;
        }
        if (level > 0 && total < kManyUnits * num_blocks) even_out();
    }

    // All units of the level, and counted anew.
    __device__ __forceinline__ void even_out() {
        level |= kEven;
        int count = 0;
#pragma unroll 1
        for (int i = 0; i < each; ++i) {
            const int request = lane * each + i;
            count += in.passes * span_of(length_of(request, in.batch), level_of(request, level)).units;
        }
        const int up_to = sum_up_to(count, lane);
        before = up_to - count;
        total = __shfl_sync(kAllLanes, up_to, 31);
    }

    __device__ __forceinline__ int length_of(int request, int end) const {
        return request < end ? load_past_l1(in.lengths + request) : 0;
    }

    // Of most requests `of_most`, less one for the last quarter or eighth, and one more wherever half as many are left.
    __device__ __forceinline__ int level_of(int request, int of_most) const {
        const int halvings = __clz(4 * (in.batch - request)) - __clz(in.batch);
        return of_most & kEven ? of_most - kEven : max(0, of_most - max(0, halvings));
    }

    __device__ __forceinline__ Span span_of(int length, int of_level) const {
        Span span;
        span.start = in.window > 0 && length > in.window ? length - in.window : 0;
        span.first = span.start & ~15;
        span.tiles = length > 0 ? (length - span.first + kTile - 1) / kTile : 0;
        const int bits = 32 - __clz(max(span.tiles - 1, 0));
        span.chunk_shift = min(max(bits - in.most_bits, in.least_shift), 5);
        span.unit_shift = min(span.chunk_shift + of_level, 5);
        span.units = (span.tiles + (1 << span.unit_shift) - 1) >> span.unit_shift;
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
        const Span span = span_of(length, level_of(unit.request, level));
        unit.place = (id - base) / in.passes, unit.places = span.units;
        const int pass = id - base - unit.place * in.passes;
        // A pass has up to kHeads heads of one KV head: which, is known from how many passes there are of each.
        unit.kv_head = in.group <= kHeads ? pass : pass / ((in.group + kHeads - 1) / kHeads);
        const int first = pass - unit.kv_head * ((in.group + kHeads - 1) / kHeads);
        unit.head = unit.kv_head * in.group + first * kHeads;
        unit.heads = min(kHeads, (unit.kv_head + 1) * in.group - unit.head);
        unit.token = span.first + ((unit.place * kTile) << span.unit_shift);
        unit.start = span.start, unit.length = length;
        unit.tiles = min(1 << span.unit_shift, span.tiles - (unit.place << span.unit_shift));
        unit.id = id, unit.item = unit.request * in.passes + pass;
        unit.chunk_tiles = 1 << span.chunk_shift;
        unit.each = (1 << kLevels) >> (span.unit_shift - span.chunk_shift);
        return unit;
    }

    // Among a lane's requests, from `request` on, whose units begin at `base`: both become those of the unit's request.
    __device__ __forceinline__ int find_among(int& request, int& base, int id) const {
        const int end = min(request + each, in.batch);
#pragma unroll 1
        for (;; request += 32) {
            const int length = length_of(request + lane, end);
            const int mine = in.passes * span_of(length, level_of(request + lane, level)).units;
            const int up_to = base + sum_up_to(mine, lane);
            const unsigned beyond = __ballot_sync(kAllLanes, up_to > id);
            base = __shfl_sync(kAllLanes, up_to - (beyond ? mine : 0), beyond ? __ffs(beyond) - 1 : 31);
            if (!beyond) continue;
            request += __ffs(beyond) - 1;
            return __shfl_sync(kAllLanes, length, __ffs(beyond) - 1);
        }
    }
};

}  // namespace
