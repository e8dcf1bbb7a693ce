// How the work of paged_decode_attention is cut into units.
//
// An item is a request and a pass: up to eight query heads of one KV head. Its visible tokens are cut in two, and each
// half again, as often as their number says: into 2^n chunks that differ by a tile at most. Sums over chunks are added
// up as a tree over each 16 of them, and these in order. A unit is a subtree: 1, 2, 4, 8 or 16 chunks, by how much work
// there is, and its root is what it leaves to be added up. So an item's result depends neither on who else is in the
// batch nor on the GPU's size, whatever its units are.
//
// Units are numbered pass by pass, then along the tokens, then request by request: those that are worked on at the same
// time read the same tokens' rows of all heads, whole pieces of memory. All units of a launch are of one level: the one
// by which the blocks of threads, given how many there are, are estimated to end first.
#pragma once

#include "numbers.cuh"
#include "paged_decode_attention.cuh"

namespace {

constexpr int kHeads = 8;       // query heads of one pass: the width of a matrix product
constexpr int kMostBits = 4;    // of a request's chunks, 2^4, as far as they get no longer than 2^5 tiles
constexpr int kChunkBits = 5, kLeastHalves = 5;  // and none has less than five halves of a tile
constexpr int kUnitBits = 6, kMostTiles = 1 << kUnitBits;  // of a unit
constexpr int kLevels = 4;      // of a tree
constexpr int kManyHeads = 4;   // of a pass, whose partial results take a while to add up

// How long a choice of units takes, in the time of a tile: what a unit costs beside its tiles, with few heads and with
// many, and how much of a unit some blocks are late. As measured (docs/notes/paged_decode_attention.md).
constexpr float kUnitCost = 0.75f, kManyHeadsUnitCost = 2.0f, kEndCost = 0.75f;

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

    __device__ __forceinline__ int num_heads() const { return num_kv_heads * group; }
};

// The part of a request that its query sees: tokens [start, length), in tiles that begin at `first`.
struct Span {
    int start, first, tiles, bits;  // 2^bits chunks

    // Of how many chunks, as bits, a unit of a level is: no more than there are, and than have room.
    __device__ __forceinline__ int unit_bits(int level) const {
        return min(level, bits - (32 - __clz(max(tiles - 1, 0) >> kUnitBits)));
    }

    __device__ __forceinline__ int most_tiles(int of_unit) const {
        return (tiles + (1 << (bits - of_unit)) - 1) >> (bits - of_unit);
    }

    __device__ __forceinline__ int units(int level) const { return tiles > 0 ? 1 << (bits - unit_bits(level)) : 0; }
};

// Unit `place` of the `places` of an item; `each` make a whole tree. `head` is the first of its `heads` query heads.
// Its tokens begin at `token`; of the request's, [start, length) are seen. No unit: tiles is 0. Its chunks begin with
// `chunk` of the 2^chunk_bits into which `item_tiles` are cut.
struct alignas(16) Unit {
    int request, kv_head, head, heads;
    int token, start, length, tiles;
    int id, item, place, places;
    int chunk, chunk_bits, item_tiles, each;

    // Where chunk `number` of the item begins.
    __device__ __forceinline__ int tile_of(int number) const { return number * item_tiles >> chunk_bits; }

    // Where chunk `number` of the unit ends, in the unit.
    __device__ __forceinline__ int end_of(int number) const { return tile_of(chunk + number + 1) - tile_of(chunk); }
};

__device__ __forceinline__ int sum_up_to(int value, int lane) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kAllLanes, value, offset);
        if (lane >= offset) value += other;
    }
    return value;
}

__device__ __forceinline__ int sum_of(int value) { return __reduce_add_sync(kAllLanes, value); }

__device__ __forceinline__ int highest_of(int value) { return __reduce_max_sync(kAllLanes, value); }

// A warp's way from a unit's number to the unit. A lane knows how many units come before its `each` requests.
template <typename T, int kTile> struct Units {
    const Inputs<T>& in;
    int lane, each, level, before, total, first_length;

    __device__ __forceinline__ Units(const Inputs<T>& inputs, int of_lane, int num_blocks)
        : in(inputs), lane(of_lane), each((in.batch + 31) / 32), level(0) {
        Counts counts;
#pragma unroll 4
        for (int i = 0; i < each; ++i) {
            const int request = lane * each + i, length = length_of(request, in.batch);
            if (i == 0) first_length = length;
            count(counts, span_of(length));
        }
        before = counts.units[0];
        if (in.passes * sum_of(before) > num_blocks) choose(counts, num_blocks);
        before *= in.passes;
        const int up_to = sum_up_to(before, lane);
        before = up_to - before;
        total = __shfl_sync(kAllLanes, up_to, 31);
    }

    // Of this lane's requests, for one pass: units by level; tiles, also of the longest request.
    struct Counts {
        int units[kLevels + 1] = {}, tiles = 0, longest = 0;
    };

    __device__ __forceinline__ void count(Counts& counts, const Span& span) const {
        counts.tiles += span.tiles;
        counts.longest = max(counts.longest, span.tiles);
#pragma unroll
        for (int l = 0; l <= kLevels; ++l) counts.units[l] += span.units(l);
    }

    // The level that takes least time, and how many units of it this lane's requests have. If units are alike, blocks
    // work in rounds; if not, who ends earlier takes the next one, and some are late by most of a unit in the end.
    __device__ __forceinline__ void choose(const Counts& counts, int num_blocks) {
        const float of_unit = in.group < kManyHeads ? kUnitCost : kManyHeadsUnitCost;
        const float each_block = in.passes * __frcp_rn(static_cast<float>(num_blocks));
        const int tiles = sum_of(counts.tiles), most = highest_of(counts.longest);
        const Span longest{0, 0, most, bits_of(most)};
        float least = 0.0f;
#pragma unroll
        for (int l = 0; l <= kLevels; ++l) {
            const int units = sum_of(counts.units[l]), largest = longest.most_tiles(longest.unit_bits(l));
            // Less a little, which what is left of a division is more than, and errors are not.
            const float rounds = fmaxf(ceilf(units * each_block - 0.001f), 1.0f) * (largest + of_unit);
            const float shared = (tiles + units * of_unit) * each_block + kEndCost * largest;
            if (l > 0 && fminf(rounds, shared) > least) continue;
            least = fminf(rounds, shared), level = l, before = counts.units[l];
        }
    }

    __device__ __forceinline__ int length_of(int request, int end) const {
        return request < end ? load_past_l1(in.lengths + request) : 0;
    }

    __device__ __forceinline__ Span span_of(int length) const {
        Span span;
        span.start = in.window > 0 && length > in.window ? length - in.window : 0;
        span.first = span.start & ~15;
        span.tiles = length > 0 ? (length - span.first + kTile - 1) / kTile : 0;
        span.bits = bits_of(span.tiles);
        return span;
    }

    __device__ __forceinline__ static int bits_of(int tiles) {
        const int even = 31 - __clz(max(2 * tiles / kLeastHalves, 1));
        const int needed = 32 - __clz(max(tiles - 1, 0) >> kChunkBits);
        return max(min(even, kMostBits), needed);
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
        const int unit_bits = span.unit_bits(level);
        unit.place = (id - base) / in.passes, unit.places = 1 << (span.bits - unit_bits);
        const int pass = id - base - unit.place * in.passes;
        // A pass has up to kHeads heads of one KV head: which, is known from how many passes there are of each.
        unit.kv_head = in.group <= kHeads ? pass : pass / ((in.group + kHeads - 1) / kHeads);
        const int first = pass - unit.kv_head * ((in.group + kHeads - 1) / kHeads);
        unit.head = unit.kv_head * in.group + first * kHeads;
        unit.heads = min(kHeads, (unit.kv_head + 1) * in.group - unit.head);
        unit.chunk = unit.place << unit_bits, unit.chunk_bits = span.bits, unit.item_tiles = span.tiles;
        unit.token = span.first + unit.tile_of(unit.chunk) * kTile;
        unit.start = span.start, unit.length = length;
        unit.tiles = unit.end_of((1 << unit_bits) - 1);
        unit.id = id, unit.item = unit.request * in.passes + pass;
        unit.each = (1 << kLevels) >> unit_bits;
        return unit;
    }

    // Among a lane's requests, from `request` on, whose units begin at `base`: both become those of the unit's request.
    __device__ __forceinline__ int find_among(int& request, int& base, int id) const {
        const int end = min(request + each, in.batch);
#pragma unroll 1
        for (;; request += 32) {
            const int length = length_of(request + lane, end);
            const int mine = in.passes * span_of(length).units(level);
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
