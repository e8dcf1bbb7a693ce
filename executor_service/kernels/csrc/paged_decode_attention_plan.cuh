// How the work of paged_decode_attention is divided: whole-number arithmetic alone.
//
// An item is one request and one pass (a KV head with up to eight of its query heads). Its tokens are cut into tiles of
// kTile, and those into at most kMaxLeaves leaves of 2^leaf_shift tiles: a cut that depends on the request's own length
// and on nothing else. Items are dealt out to lanes, pass by pass; in a lane the tiles of all items stand in one line.
//
// A range is a piece of a line, its bounds moved to the nearest leaf. Range r is piece r / num_lanes of lane r %
// num_lanes: ranges that are worked on at the same time are of neighbouring heads and the same tokens, which the memory
// likes. Every worker has the range of its own number. Multiprocessors are not equally fast at reading; where there is
// much to do, these first ranges leave a part of the line over, in ranges that become smaller and go to whoever is free.
// What a leaf adds to the result does not depend on who computes it.
#pragma once

constexpr int kMaxLeaves = 16;
constexpr int kManyTiles = 24;  // per worker: from here on ranges are handed out

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
    span.leaf_shift = max(bits - num_bits(kMaxLeaves - 1), 0);
    span.leaves = (span.tiles + (1 << span.leaf_shift) - 1) >> span.leaf_shift;
    return span;
}

// The leaf that begins nearest to tile `at` of an item; span.leaves where that is the item's end.
__device__ __forceinline__ int nearest_leaf(int at, const Span& span) {
    return (at + ((1 << span.leaf_shift) >> 1)) >> span.leaf_shift;
}

// The pieces that a lane's line of `total` tiles is cut into: rounds of `each` equal ones, `step` is 2^32 / each, rounded
// up. The first of kRounds has 40 of 64 parts of the line, the others 12, 6, 3 and 3; a single round has all.
struct Line {
    static constexpr int kRounds = 5;

    int each, total;
    unsigned step;

    __device__ __forceinline__ int num_rounds() const { return total >= kManyTiles * each ? kRounds : 1; }

    __device__ __forceinline__ int num_pieces() const { return num_rounds() * each; }

    // Parts of 64 before a round, a byte each; the last is the end.
    __device__ __forceinline__ static int parts_before(int round) { return 0x403d3a342800ull >> (8 * round) & 0xff; }

    // Where a piece begins, before that is moved to a leaf.
    __device__ __forceinline__ int begin_of(int piece) const {
        if (piece >= num_pieces()) return total;
        const int round = piece / each;
        unsigned fraction = (piece - round * each) * step;
        if (num_rounds() > 1) {
            const int before = parts_before(round);
            fraction = (static_cast<unsigned>(before) << 26) + (fraction >> 6) * (parts_before(round + 1) - before);
        }
        return static_cast<int>(__umulhi(fraction, total));
    }

    // The last piece that begins at `tile` or before.
    __device__ __forceinline__ int last_piece_at(int tile) const {
        float about = __fdividef(tile + 1, total);
        int round = 0;
        if (num_rounds() > 1) {
            about *= 64.0f;
            while (round + 1 < kRounds && about > parts_before(round + 1)) ++round;
            const int before = parts_before(round);
            about = __fdividef(about - before, parts_before(round + 1) - before);
        }
        int piece = min(round * each + static_cast<int>(about * each) + 1, num_pieces() - 1);
        while (begin_of(piece) > tile) --piece;
        while (piece + 1 < num_pieces() && begin_of(piece + 1) <= tile) ++piece;
        return piece;
    }
};

// The piece that leaf `leaf` of the item whose tiles begin at `base` lies in.
__device__ __forceinline__ int piece_of(int leaf, int base, const Span& span, const Line& line) {
    // The last tile at which a piece may begin that still moves to this leaf or to one before it.
    const int half = (1 << span.leaf_shift) >> 1;
    return line.last_piece_at(base + min(((leaf + 1) << span.leaf_shift) - half - 1, span.tiles - 1));
}

// Where a leaf's partial result lies among its range's: 0 is for all leaves that a range has from an item's begin on,
// 1 + k for the k-th leaf of the item in whose middle it begins.
__device__ __forceinline__ int slot_of(int leaf, int piece, int base, const Span& span, const Line& line) {
    const int begin = line.begin_of(piece);
    const int first_leaf = begin > base ? nearest_leaf(begin - base, span) : 0;
    return first_leaf == 0 ? 0 : 1 + leaf - first_leaf;
}
