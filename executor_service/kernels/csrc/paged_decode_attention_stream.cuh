// The streaming kernel of paged_decode_attention: 16-bit caches, heads of 64 or 128, blocks of a power of two from 16 on.
//
// A persistent grid. Each block of threads walks over the tiles of its ranges (see the plan), which cross items and
// ranges without a stop: copies run kStages tiles ahead, look-ups of block tables further still. A tile's scores are
// keys x queries on the tensor cores, each warp for 16 tokens; through shared memory every warp sees them all and
// multiplies them with its own part of the values' dimensions. Scores are made one tile ahead, so that one barrier a
// tile is enough.
#pragma once

#include "dependent.cuh"
#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_merge.cuh"
#include "paged_decode_attention_plan.cuh"
#include "paged_decode_attention_walk.cuh"

namespace {

// Everything that follows from the shape of a head and the size of a tile.
template <int kDim, int kWarps, int kStages> struct Shape {
    static constexpr int kThreads = 32 * kWarps, kTile = 16 * kWarps;
    static constexpr int kRowChunks = kDim / 8;  // of 16 bytes in a row
    static constexpr int kRowBytes = 2 * kDim, kTileBytes = kTile * kRowBytes, kQueryBytes = kHeads * kRowBytes;
    static constexpr int kRowStep = 32 / kRowChunks;    // rows that a warp copies at once
    static constexpr int kSlices = kDim / kWarps / 16;  // of 16 dimensions, per warp
    static constexpr int kScoreStride = kTile + 8;
    static constexpr int kKeys = 0, kValues = kStages * kTileBytes, kQueries = 2 * kStages * kTileBytes;
    static constexpr int kScores = kQueries + kStages * kQueryBytes;
    static_assert(kSlices >= 1 && 2 * kStages < kPlaces && kWarps > 1);
};

// Where a 16-byte chunk of a row lies: rows that are read together must not lie on the same banks.
__device__ __forceinline__ unsigned row_chunk(unsigned base, int row, int row_bytes, int chunk) {
    return base + row * row_bytes + ((chunk ^ (row & 7)) << 4);
}

template <typename T, int kDim, int kWarps, int kStages> struct Decoder {
    using S = Shape<kDim, kWarps, kStages>;
    using M = Merge<T, kDim, kWarps>;

    const Inputs<T>& in;
    unsigned shared;
    float* scores;
    const Place* places;
    const int (*blocks)[kWarps];  // of each 16 tokens
    Pending* pending;
    Walk<T, S::kTile> walk;
    M merge;
    int thread, lane, warp;

    // Sums over values, in fragments [dimension, head], and the maxima and sums of head lane / 4.
    float leaf[S::kSlices][4], item[S::kSlices][4];
    float leaf_max, leaf_sum, item_max, item_sum;
    unsigned queries[kDim / 16][2];

    // The first warp looks up tile `number`.
    __device__ __forceinline__ void look_up(int number) {
        if (warp == 0) walk.look_up(number);
    }

    // Starts to copy this warp's 16 rows of tile `number`; those that the query does not see become zeros. Neighbouring
    // lanes write neighbouring chunks: it is what they read that is in another order.
    __device__ __forceinline__ void copy_rows(const T* cache, unsigned to, int number) const {
        const Place& of = places[number % kPlaces];
        const int row_size = in.num_kv_heads * kDim, row0 = lane / S::kRowChunks, place = lane % S::kRowChunks;
        const int in_block = (of.token + 16 * warp) & ((1 << in.block_shift) - 1);
        const T* rows = cache +
                        static_cast<long long>(blocks[number % kPlaces][warp]) * (row_size << in.block_shift) +
                        (in_block + row0) * row_size + of.kv_head * kDim;
        const int begin = of.begin - 16 * warp - row0, end = of.end - 16 * warp - row0;
        to += (16 * warp + row0) * S::kRowBytes + place * 16;
        if (begin <= -row0 && end >= 16 - row0) {
#pragma unroll
            for (int i = 0; i < 16; i += S::kRowStep)
                copy_async(to + i * S::kRowBytes, rows + i * row_size + (place ^ ((row0 + i) & 7)) * 8, true);
        } else {
#pragma unroll 1
            for (int i = 0; i < 16; i += S::kRowStep)
                copy_async(to + i * S::kRowBytes, rows + i * row_size + (place ^ ((row0 + i) & 7)) * 8,
                           i >= begin && i < end);
        }
    }

    __device__ __forceinline__ void copy_query(unsigned to, const Place& of) const {
        const int heads = merge.heads_of(of);
        const T* from = in.query + (static_cast<long long>(of.request) * in.num_heads + of.head) * kDim;
#pragma unroll
        for (int i = 0; i < kHeads * S::kRowChunks; i += S::kThreads) {
            const int head = (i + thread) / S::kRowChunks, chunk = thread % S::kRowChunks;
            if (kHeads * S::kRowChunks < S::kThreads && head >= kHeads) break;
            copy_async(row_chunk(to, head, S::kRowBytes, chunk), from + (head < heads ? head * kDim + chunk * 8 : 0),
                       head < heads);
        }
    }

    // Starts copies `number`, keys of that tile and values of the one before it, to `stage` and to the one before that.
    __device__ __forceinline__ void copy(int number, int stage, int stage_before) const {
        const Place& of = places[number % kPlaces];
        if (of.range >= 0) {
            copy_rows(in.keys, shared + S::kKeys + stage * S::kTileBytes, number);
            if (of.is(kBeginsItem | kBeginsRange)) copy_query(shared + S::kQueries + stage * S::kQueryBytes, of);
        }
        if (number > 0 && places[(number - 1) % kPlaces].range >= 0)
            copy_rows(in.values, shared + S::kValues + stage_before * S::kTileBytes, number - 1);
        commit_copies();
    }

    // The first copies, once all of their blocks are known.
    __device__ __forceinline__ void begin(int first_range) {
        walk.begin(first_range);
#pragma unroll 1
        for (int i = 0; i < 2 * kStages - 1; ++i) look_up(i);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < kStages; ++i) copy(i, i, i - 1);
    }

    // Scores of tile `number`, this warp's 16 tokens against all heads.
    __device__ __forceinline__ void score(int number, int stage) {
        if (places[number % kPlaces].is(kBeginsItem | kBeginsRange)) {
            const unsigned from = shared + S::kQueries + stage * S::kQueryBytes;
#pragma unroll
            for (int i = 0; i < kDim / 32; ++i) {
                unsigned four[4];
                load_matrices(four, row_chunk(from, lane % 8, S::kRowBytes, 4 * i + lane / 8));
                queries[2 * i][0] = four[0], queries[2 * i][1] = four[1];
                queries[2 * i + 1][0] = four[2], queries[2 * i + 1][1] = four[3];
            }
        }
        const unsigned from = shared + S::kKeys + stage * S::kTileBytes;
        const int row = 16 * warp + lane % 16;
        float sums[2][4] = {};
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            unsigned keys[4];
            load_matrices(keys, row_chunk(from, row, S::kRowBytes, 2 * i + lane / 16));
            multiply_add<T>(sums[i % 2], keys, queries[i][0], queries[i][1]);
        }
        float* to = scores + (number % 2) * kHeads * S::kScoreStride + 2 * (lane % 4) * S::kScoreStride + 16 * warp +
                    lane / 4;
        to[0] = sums[0][0] + sums[1][0];
        to[S::kScoreStride] = sums[0][1] + sums[1][1];
        to[8] = sums[0][2] + sums[1][2];
        to[S::kScoreStride + 8] = sums[0][3] + sums[1][3];
    }

    // Adds tile `number` to the leaf's sums.
    __device__ __forceinline__ void attend(int number, int stage, const Place& place) {
        float p[2 * kWarps][2], factor = in.scale;
        const float* row = scores + ((number % 2) * kHeads + lane / 4) * S::kScoreStride + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 2 * kWarps; ++i) p[i][0] = row[8 * i], p[i][1] = row[8 * i + 1];
        if (in.softcap > 0.0f) {
            factor = in.softcap;
#pragma unroll
            for (int i = 0; i < 2 * kWarps; ++i)
                p[i][0] = tanh_of(p[i][0] * in.scale), p[i][1] = tanh_of(p[i][1] * in.scale);
        }
        if (place.begin > 0 || place.end < S::kTile) {
#pragma unroll
            for (int i = 0; i < 2 * kWarps; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int token = 8 * i + 2 * (lane % 4) + e;
                    if (token < place.begin || token >= place.end) p[i][e] = lowest();
                }
        }
        start_tile(p, factor, place.is(kBeginsLeaf));
        const unsigned values = shared + S::kValues + stage * S::kTileBytes;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            const unsigned low = pair_of<T>(p[2 * i][0], p[2 * i][1]);
            const unsigned high = pair_of<T>(p[2 * i + 1][0], p[2 * i + 1][1]);
#pragma unroll
            for (int s = 0; s < S::kSlices; ++s) {
                unsigned part[4];
                const int token = 16 * i + lane / 16 * 8 + lane % 8;
                const int chunk = 2 * (warp * S::kSlices + s) + lane / 8 % 2;
                load_matrices_transposed(part, row_chunk(values, token, S::kRowBytes, chunk));
                multiply_add<T>(leaf[s], part, low, high);
            }
        }
    }

    // Scores become exponentials relative to the leaf's maximum so far, to which the sums are brought, too.
    __device__ __forceinline__ void start_tile(float (&p)[2 * kWarps][2], float factor, bool begins_leaf) {
        float maximum = lowest();
#pragma unroll
        for (int i = 0; i < 2 * kWarps; ++i) maximum = fmaxf(maximum, fmaxf(p[i][0], p[i][1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2)) * factor;
        if (begins_leaf) {
            leaf_max = maximum;
            leaf_sum = 0.0f;
#pragma unroll
            for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
                for (int e = 0; e < 4; ++e) leaf[s][e] = 0.0f;
        } else {
            const Fold fold(leaf_max, maximum);
            leaf_max = fold.maximum;
            leaf_sum *= fold.kept;
            float kept[2];
            spread(fold.kept, kept);
#pragma unroll
            for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
                for (int e = 0; e < 4; ++e) leaf[s][e] *= kept[e % 2];
        }
#pragma unroll
        for (int i = 0; i < 2 * kWarps; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                p[i][e] = exp2_of(__fmaf_rn(p[i][e], factor, -leaf_max));
                leaf_sum += p[i][e];
            }
    }

    // From a value of head lane / 4 to those of the two heads whose sums this lane holds.
    __device__ __forceinline__ void spread(float value, float (&to)[2]) const {
        to[0] = __shfl_sync(0xffffffffu, value, lane % 4 * 8);
        to[1] = __shfl_sync(0xffffffffu, value, lane % 4 * 8 + 4);
    }

    // The leaf is complete: its sum over all lanes, and where a worker has the item from its begin on, the item's sums.
    __device__ __forceinline__ void close_leaf(bool is_whole, bool is_first) {
        leaf_sum += __shfl_xor_sync(0xffffffffu, leaf_sum, 1);
        leaf_sum += __shfl_xor_sync(0xffffffffu, leaf_sum, 2);
        if (!is_whole) return;
        if (is_first) {
            item_max = leaf_max, item_sum = leaf_sum;
#pragma unroll
            for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
                for (int e = 0; e < 4; ++e) item[s][e] = leaf[s][e];
            return;
        }
        const Fold fold(item_max, leaf_max);
        float kept[2], added[2];
        spread(fold.kept, kept);
        spread(fold.added, added);
        item_max = fold.maximum;
        item_sum = folded(item_sum, fold.kept, leaf_sum, fold.added);
#pragma unroll
        for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) item[s][e] = folded(item[s][e], kept[e % 2], leaf[s][e], added[e % 2]);
    }

    __device__ __forceinline__ void run(int first_range) {
        begin(first_range);
        if (places[0].range < 0) return;
        wait_for_copies<kStages - 1>();
        __syncthreads();
        score(0, 0);
        bool is_whole = false;  // whether the range has the item from its begin on
        int leaves = 0, num_pending = 0, stage = 0, stage_before = kStages - 1;
#pragma unroll 1
        for (int t = 0;; ++t) {
            wait_for_copies<kStages - 2>();
            __syncthreads();
            const Place place = places[t % kPlaces];
            if (num_pending == kMaxPending || (num_pending > 0 && place.range < 0)) {
                merge.finish(num_pending);
                num_pending = 0;
            }
            if (place.range < 0) break;
            const int stage_after = stage + 1 < kStages ? stage + 1 : 0;
            look_up(t + 2 * kStages - 1);
            copy(t + kStages, stage, stage_before);
            if (places[(t + 1) % kPlaces].range >= 0) score(t + 1, stage_after);
            attend(t, stage, place);
            stage_before = stage, stage = stage_after;
            if (place.is(kBeginsItem | kBeginsRange)) {
                is_whole = place.is(kBeginsItem);
                leaves = 0;
            }
            if (!place.is(kEndsLeaf)) continue;
            close_leaf(is_whole, leaves == 0);
            if (!is_whole) write_partial(merge.slot(place.range, 1 + leaves), place, leaf, leaf_max, leaf_sum);
            ++leaves;
            if (place.is(kEndsItem) && is_whole) {
                write_item(place);
            } else if (place.is(kEndsItem | kEndsRange)) {
                if (is_whole) write_partial(merge.slot(place.range, 0), place, item, item_max, item_sum);
                if (thread == 0)
                    pending[num_pending] = Pending{place.request, place.kv_head, place.head, place.token + place.end,
                                                   place.base, place.range % in.num_lanes, leaves};
                ++num_pending;
            }
        }
    }

    __device__ __forceinline__ void write_partial(
        float* to, const Place& place, const float (&sums)[S::kSlices][4], float maximum, float sum) const {
        const int heads = merge.heads_of(place);
#pragma unroll
        for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int head = lane % 4 * 2 + e % 2;
                const int dim = (warp * S::kSlices + s) * 16 + lane / 4 + e / 2 * 8;
                if (head < heads) to[head * M::kPartial + dim] = sums[s][e];
            }
        if (warp == 0 && lane % 4 == 0 && lane / 4 < heads) {
            to[lane / 4 * M::kPartial + kDim] = maximum;
            to[lane / 4 * M::kPartial + kDim + 1] = sum;
        }
    }

    __device__ __forceinline__ void write_item(const Place& place) const {
        const int heads = merge.heads_of(place);
        T* to = merge.out_of(place);
        float sums[2];
        spread(item_sum, sums);
        const float factors[2] = {__frcp_rn(sums[0]), __frcp_rn(sums[1])};
#pragma unroll
        for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int head = lane % 4 * 2 + e % 2;
                const int dim = (warp * S::kSlices + s) * 16 + lane / 4 + e / 2 * 8;
                if (head < heads) to[head * kDim + dim] = from_float<T>(item[s][e] * factors[e % 2]);
            }
    }
};

template <typename T> __device__ __forceinline__ void zero_empty_requests(const Inputs<T>& in, int width) {
#pragma unroll 1
    for (int r = blockIdx.x; r < in.batch; r += gridDim.x) {
        if (in.lengths[r] > 0) continue;
        for (int i = threadIdx.x; i < width; i += blockDim.x)
            in.out[static_cast<long long>(r) * width + i] = from_float<T>(0.0f);
    }
}

template <typename T, int kDim, int kWarps, int kStages> __device__ __forceinline__ void stream(const Inputs<T>& in) {
    using S = Shape<kDim, kWarps, kStages>;
    static_assert(S::kThreads == kChunks);
    extern __shared__ uint4 memory[];
    __shared__ Place places[kPlaces];
    __shared__ int blocks[kPlaces][kWarps];
    __shared__ Pending pending[kMaxPending];
    __shared__ int starts[kChunks];
    let_next_begin();
    // Blocks that run on one processor, as these are handed out, get neighbouring pieces of one lane: together the same
    // amount.
    const int processor = blockIdx.x % in.num_processors, each = gridDim.x / in.num_processors;
    const int piece = processor / in.num_lanes * each + blockIdx.x / in.num_processors;
    const int group = in.group(), slices = in.slices();
    const int thread = threadIdx.x, warp = __shfl_sync(0xffffffffu, thread / 32, 0);
    wait_for_previous();
    const int total =
        find_starts<S::kTile>(starts, in.lengths, in.batch, in.num_kv_heads * slices / in.num_lanes, in.window);
    const Line line{static_cast<int>(gridDim.x) / in.num_lanes, total, in.step};
    const int lane = thread % 32;
    Decoder<T, kDim, kWarps, kStages> decoder{
        in, shared_address(memory), reinterpret_cast<float*>(memory + S::kScores / 16), places, blocks, pending,
        {in, places, blocks, starts, line, group, slices, lane},
        {in, pending, line, group, slices, thread, lane, warp},
        thread, lane, warp};
    decoder.run(piece * in.num_lanes + processor % in.num_lanes);
    zero_empty_requests(in, in.num_heads * kDim);
    if (thread == 0 && line.num_rounds() > 1 && atomicInc(&num_served, gridDim.x - 1) == gridDim.x - 1)
        num_handed_out = 0;
}

}  // namespace
