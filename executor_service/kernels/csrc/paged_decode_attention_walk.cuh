// Which tiles a block of threads of paged_decode_attention works on, one after the other: found by its first warp.
#pragma once

#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_plan.cuh"

namespace {

constexpr int kHeads = 8;  // query heads of one pass: the width of a matrix product
constexpr int kPlaces = 16;
constexpr int kChunks = 128;  // of requests, whose places in the line are kept
constexpr int kFetchAt = 6;   // tiles before the end of a range, the next one is asked for

// Ranges that have been handed out, and blocks that want no more: the last of them sets both to zero again. Two launches
// must not run at the same time: on one stream they do not, launched dependently or not.
__device__ unsigned num_handed_out, num_served;

template <typename T> struct Inputs {
    const T* query;
    const T* keys;
    const T* values;
    const int* block_tables;
    const int* lengths;
    T* out;
    float* partials;
    int batch, num_heads, num_kv_heads, block_shift, table_stride;
    float scale, softcap;
    int window, num_processors, num_lanes;
    unsigned step;

    __device__ __forceinline__ int group() const { return num_heads / num_kv_heads; }

    __device__ __forceinline__ int slices() const { return (group() + kHeads - 1) / kHeads; }  // passes per KV head
};

enum Mark { kBeginsItem = 1, kBeginsRange = 2, kBeginsLeaf = 4, kEndsLeaf = 8, kEndsItem = 16, kEndsRange = 32 };

// What is to be done with a tile: of an item whose first tile is number `base` of its line, beginning at `token`, of whose
// tokens [begin, end) are seen; `head` is the first query head. No more tiles: range is -1.
struct alignas(16) Place {
    int request, kv_head, head, base;
    int token, begin, end;
    short marks, range;

    __device__ __forceinline__ bool is(int mark) const { return marks & mark; }
};

// Where requests lie in a lane's line: `starts` of chunks of as many requests each; returns the line's length.
template <int kTile>
__device__ __forceinline__ int find_starts(
    int (&starts)[kChunks], const int* lengths, int batch, int passes, int window) {
    __shared__ int warp_sums[kChunks / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (batch + kChunks - 1) / kChunks;
    const int from = min(static_cast<int>(threadIdx.x) * each, batch), to = min(from + each, batch);
    int mine = 0;
#pragma unroll 1
    for (int r = from; r < to; ++r) mine += passes * span_of<kTile>(lengths[r], window).tiles;
    int before = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += other;
    }
    if (lane == 31) warp_sums[warp] = before;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kChunks / 32; ++w) {
        if (w < warp) before += warp_sums[w];
        total += warp_sums[w];
    }
    starts[threadIdx.x] = before - mine;
    __syncthreads();
    return total;
}

// The ranges and tiles of a block, as its first warp walks through them.
template <typename T, int kTile> struct Walk {
    const Inputs<T>& in;
    Place* places;
    int (*blocks)[kTile / 16];  // of each 16 tokens
    const int (&starts)[kChunks];
    const Line& line;
    int group, slices, lane;

    int range, next_range, left;  // next_range only in the first lane; `left` tiles of the range
    bool is_fetched, begins_range;
    int request, pass, tile, length, base;
    Span span;

    __device__ __forceinline__ void begin(int first_range) {
        next_range = first_range, left = 0, begins_range = false, is_fetched = true;
    }

    // The leaf that begins nearest to tile `at` of a lane's line: where in the line it lies, and in which item.
    __device__ __forceinline__ int seek(int at) {
        const int passes = in.num_kv_heads * slices / in.num_lanes, each = (in.batch + kChunks - 1) / kChunks;
        if (at >= line.total) return line.total;
        int chunk = 0;
#pragma unroll
        for (int step = kChunks / 2; step; step /= 2)
            if (starts[chunk + step] <= at) chunk += step;
        request = chunk * each, base = starts[chunk], length = in.lengths[request];
        span = span_of<kTile>(length, in.window);
#pragma unroll 1
        while (at >= base + passes * span.tiles) {
            base += passes * span.tiles;
            length = in.lengths[++request];
            span = span_of<kTile>(length, in.window);
        }
        pass = (at - base) / span.tiles;
        base += pass * span.tiles;
        tile = min(nearest_leaf(at - base, span) << span.leaf_shift, span.tiles);
        return base + tile;
    }

    // Opens the next range that has tiles; whether there is one.
    __device__ __forceinline__ bool open_range() {
#pragma unroll 1
        while ((range = __shfl_sync(0xffffffffu, next_range, 0)) < line.num_pieces() * in.num_lanes) {
            is_fetched = false;
            const int piece = range / in.num_lanes;
            // Two lanes look for both ends at the same time.
            const int at = seek(line.begin_of(piece + lane % 2));
            const int begin = __shfl_sync(0xffffffffu, at, 0);
            left = __shfl_sync(0xffffffffu, at, 1) - begin;
            if (left > 0) {
                request = __shfl_sync(0xffffffffu, request, 0);
                pass = __shfl_sync(0xffffffffu, pass, 0) * in.num_lanes + range % in.num_lanes;
                tile = __shfl_sync(0xffffffffu, tile, 0);
                base = begin - tile;
                length = in.lengths[request];
                span = span_of<kTile>(length, in.window);
                if (tile == span.tiles) next_item();  // the nearest leaf was the next item's first
                begins_range = true;
                return true;
            }
            fetch_range();
        }
        return false;
    }

    __device__ __forceinline__ void fetch_range() {
        is_fetched = true;
        if (line.num_rounds() == 1)
            next_range = 1 << 30;
        else if (lane == 0)
            next_range = gridDim.x + atomicAdd(&num_handed_out, 1);
    }

    __device__ __forceinline__ void next_item() {
        base += span.tiles;
        tile = 0;
        pass += in.num_lanes;
        if (pass < in.num_kv_heads * slices) return;
        pass %= in.num_lanes;
        do length = in.lengths[++request];
        while (length <= 0);
        span = span_of<kTile>(length, in.window);
    }

    // Looks up tile `number`: notes what it is, and starts to copy the numbers of its blocks.
    __device__ __forceinline__ void look_up(int number) {
        if (left == 0 && !open_range()) {
            if (lane == 0) places[number % kPlaces].range = -1;
            return;
        }
        const int token = span.first + tile * kTile, in_leaf = tile & ((1 << span.leaf_shift) - 1);
        const bool ends_item = tile + 1 == span.tiles, ends_leaf = ends_item || in_leaf + 1 == 1 << span.leaf_shift;
        --left;
        if (lane < kTile / 16) {
            const int block = min(token + 16 * lane, length - 1) >> in.block_shift;
            copy_word_async(shared_address(&blocks[number % kPlaces][lane]),
                            in.block_tables + static_cast<long long>(request) * in.table_stride + block);
        }
        if (lane == 0) {
            const int kv_head = slices == 1 ? pass : pass / slices;
            const int marks = (tile == 0) * kBeginsItem + begins_range * kBeginsRange + (in_leaf == 0) * kBeginsLeaf +
                              ends_leaf * kEndsLeaf + ends_item * kEndsItem + (left == 0) * kEndsRange;
            places[number % kPlaces] = Place{
                request, kv_head, kv_head * group + (pass - kv_head * slices) * kHeads, base, token, span.start - token,
                length - token, static_cast<short>(marks), static_cast<short>(range)};
        }
        begins_range = false;
        ++tile;
        if (left == kFetchAt || (left == 0 && !is_fetched)) fetch_range();
        if (ends_item && left > 0) next_item();
    }
};

}  // namespace
