// Attention of one query per request over the paged KV cache: a general kernel, and one that streams 16-bit caches.
//
// The streaming kernel is a persistent grid. Each block of threads walks over the tiles of its share (see the plan),
// which cross items without a stop: copies run kStages tiles ahead. A tile's scores are keys x queries on the tensor
// cores, each warp for 16 tokens; through shared memory every warp sees them all and multiplies them with its own part
// of the values' dimensions. Scores are made one tile ahead, so that one barrier a tile is enough.
#include "dependent.cuh"
#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_plan.cuh"

namespace {

constexpr int kHeads = 8;      // query heads of one pass: the width of a matrix product
constexpr int kMaxItems = 1 << 16;
constexpr int kPlaces = 8;
__device__ __forceinline__ float lowest() { return __uint_as_float(0xff800000u); }

// Leaves of each item that have been written as partial results; whoever writes the last one sets it to zero again.
// Two launches must not run at the same time: on one stream they do not, launched dependently or not.
__device__ unsigned num_written[kMaxItems];

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
    int window, num_processors;
};

// Everything that follows from the shape of a head and the size of a tile.
template <int kDim, int kWarps, int kStages> struct Shape {
    static constexpr int kThreads = 32 * kWarps, kTile = 16 * kWarps;
    static constexpr int kChunks = kDim / 8;  // of 16 bytes in a row
    static constexpr int kRowBytes = 2 * kDim, kTileBytes = kTile * kRowBytes, kQueryBytes = kHeads * kRowBytes;
    static constexpr int kCopies = kChunks / 2;            // per thread and tile
    static constexpr int kRowStep = kThreads / kChunks;    // between a thread's copies
    static constexpr int kSlices = kDim / kWarps / 16;     // of 16 dimensions, per warp
    static constexpr int kScoreStride = kTile + 8;
    static constexpr int kKeys = 0, kValues = kStages * kTileBytes, kQueries = 2 * kStages * kTileBytes;
    static constexpr int kScores = kQueries + kStages * kQueryBytes;
    static constexpr int kPartial = kDim + 4;  // floats of one head's partial result: sums, maximum, sum, two unused
    static_assert(kRowStep <= 16 && kSlices >= 1 && kStages < kPlaces);
};

// Where a tile is: item (request, pass), its number in the item, the request's length.
struct alignas(16) Place {
    int request, pass, tile, length;
};

// Where the copies of one tile come from.
template <int kGroups> struct Source {
    int blocks[kGroups];
    int token, start, length, kv_head;
};

struct Share {
    int begin, end, request, pass, tile;
};

__device__ __forceinline__ unsigned row_chunk(unsigned base, int row, int row_bytes, int chunk) {
    return base + row * row_bytes + ((chunk ^ (row & 7)) << 4);
}

// Which tiles this worker computes, found with the whole block from the lengths alone.
template <int kTile>
__device__ int find_share(Share& share, const int* lengths, int batch, int passes, int window, int worker) {
    __shared__ int warp_sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (batch + blockDim.x - 1) / blockDim.x;
    const int from = min(static_cast<int>(threadIdx.x) * each, batch), to = min(from + each, batch);
    int mine = 0;
    for (int r = from; r < to; ++r) mine += passes * span_of<kTile>(lengths[r], window).tiles;
    int before = mine;
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += other;
    }
    if (lane == 31) warp_sums[warp] = before;
    if (threadIdx.x == 0) share = Share{0, 0, 0, 0, 0};
    __syncthreads();
    int total = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
        if (w < warp) before += warp_sums[w];
        total += warp_sums[w];
    }
    before -= mine;
    const int workers = gridDim.x;
    for (int side = 0; side < 2; ++side) {
        const int at = share_begin(worker + side, workers, total);
        if (side == 1 && at == total && threadIdx.x == 0) share.end = total;
        if (at < before || at >= before + mine) continue;
        int r = from, base = before;
        Span span = span_of<kTile>(lengths[r], window);
        while (at >= base + passes * span.tiles) {
            base += passes * span.tiles;
            span = span_of<kTile>(lengths[++r], window);
        }
        const int pass = (at - base) / span.tiles;
        base += pass * span.tiles;
        const int tile = min(nearest_leaf(at - base, span) << span.leaf_shift, span.tiles);
        if (side == 1) {
            share.end = base + tile;
        } else {
            share.begin = base + tile;
            share.request = r;
            share.pass = pass;
            share.tile = tile;
        }
    }
    __syncthreads();
    return total;
}

template <typename T> __device__ __forceinline__ void zero_empty_requests(const Inputs<T>& in, int width) {
    for (int r = blockIdx.x; r < in.batch; r += gridDim.x) {
        if (in.lengths[r] > 0) continue;
        for (int i = threadIdx.x; i < width; i += blockDim.x)
            in.out[static_cast<long long>(r) * width + i] = from_float<T>(0.0f);
    }
}

template <typename T, int kDim, int kWarps, int kStages> struct Decoder {
    using S = Shape<kDim, kWarps, kStages>;

    const Inputs<T>& in;
    unsigned shared;
    float* scores;
    Place* places;
    int group, slices, passes;  // query heads per KV head, passes per KV head, passes
    int worker, total;
    int thread, lane, warp;

    // The loader's state: the tile whose keys come next, and the one whose values do.
    Place at;
    Span span;
    Source<kWarps> next, last;

    // Sums over values, in fragments [dimension, head], and the maxima and sums of head lane / 4.
    float leaf[S::kSlices][4], item[S::kSlices][4];
    float leaf_max, leaf_sum, item_max, item_sum;
    unsigned queries[kDim / 16][2];

    __device__ __forceinline__ int heads_of(int pass) const { return min(kHeads, group - pass % slices * kHeads); }

    __device__ __forceinline__ int first_head(int pass) const {
        return pass / slices * group + pass % slices * kHeads;
    }

    __device__ __forceinline__ float* slot(int of_worker, int number) const {
        const int heads = min(kHeads, group);
        return in.partials + (static_cast<long long>(of_worker) * (kMaxLeaves + 1) + number) * heads * S::kPartial;
    }

    // Looks up the blocks of the tile `at`; the look-ups end while other tiles are worked on.
    __device__ __forceinline__ void prepare() {
        const int* table = in.block_tables + static_cast<long long>(at.request) * in.table_stride;
        next.token = span.first + at.tile * S::kTile;
        next.start = span.start;
        next.length = at.length;
        next.kv_head = at.pass / slices;
#pragma unroll
        for (int i = 0; i < kWarps; ++i)
            next.blocks[i] = __ldg(table + (min(next.token + 16 * i, at.length - 1) >> in.block_shift));
    }

    __device__ __forceinline__ void advance() {
        if (++at.tile < span.tiles) return;
        at.tile = 0;
        if (++at.pass < passes) return;
        at.pass = 0;
        do at.length = in.lengths[++at.request];
        while (at.length <= 0);
        span = span_of<S::kTile>(at.length, in.window);
    }

    __device__ __forceinline__ void copy_rows(const T* cache, unsigned to, const Source<kWarps>& from) const {
        const int row0 = thread / S::kChunks, chunk = thread % S::kChunks;
        const int row_size = in.num_kv_heads * kDim, block_mask = (1 << in.block_shift) - 1;
        const T* base = cache + from.kv_head * kDim + chunk * 8;
#pragma unroll
        for (int i = 0; i < S::kCopies; ++i) {
            const int row = row0 + i * S::kRowStep, group_of_16 = i * S::kRowStep / 16;
            const int token = from.token + row;
            const int in_block = ((from.token + 16 * group_of_16) & block_mask) + row % 16;
            const long long cache_row = (static_cast<long long>(from.blocks[group_of_16]) << in.block_shift) + in_block;
            copy_async(row_chunk(to, row, S::kRowBytes, chunk), base + cache_row * row_size,
                       token >= from.start && token < from.length);
        }
    }

    __device__ __forceinline__ void copy_query(unsigned to) const {
        const int heads = heads_of(at.pass);
        const T* from = in.query + (static_cast<long long>(at.request) * in.num_heads + first_head(at.pass)) * kDim;
#pragma unroll
        for (int i = thread; i < kHeads * S::kChunks; i += S::kThreads) {
            const int head = i / S::kChunks, chunk = i % S::kChunks;
            copy_async(row_chunk(to, head, S::kRowBytes, chunk), from + (head < heads ? head * kDim + chunk * 8 : 0),
                       head < heads);
        }
    }

    // Starts copies `number` of a share of `count` tiles: keys of that tile, values of the one before it.
    __device__ __forceinline__ void copy(int number, int count) {
        if (number < count) {
            const int stage = number % kStages;
            copy_rows(in.keys, shared + S::kKeys + stage * S::kTileBytes, next);
            if (number == 0 || at.tile == 0) copy_query(shared + S::kQueries + stage * S::kQueryBytes);
            if (thread == 0) places[number % kPlaces] = at;
        }
        if (number > 0 && number <= count)
            copy_rows(in.values, shared + S::kValues + (number - 1) % kStages * S::kTileBytes, last);
        last = next;
        if (number + 1 < count) {
            advance();
            prepare();
        }
        commit_copies();
    }

    // Scores of tile `number`, this warp's 16 tokens against all heads.
    __device__ __forceinline__ void score(int number) {
        const int stage = number % kStages;
        if (number == 0 || places[number % kPlaces].tile == 0) {
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

    // Adds tile `number` to the leaf's sums: its tokens [from, to) are seen.
    __device__ __forceinline__ void attend(int number, bool begins_leaf, int from, int to) {
        float p[2 * kWarps][2];
        const float* row = scores + ((number % 2) * kHeads + lane / 4) * S::kScoreStride + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 2 * kWarps; ++i) {
            p[i][0] = row[8 * i] * in.scale;
            p[i][1] = row[8 * i + 1] * in.scale;
        }
        if (in.softcap > 0.0f) {
#pragma unroll
            for (int i = 0; i < 2 * kWarps; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) p[i][e] = in.softcap * tanhf(p[i][e]);
        }
        if (from > 0 || to < S::kTile) {
#pragma unroll
            for (int i = 0; i < 2 * kWarps; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int token = 8 * i + 2 * (lane % 4) + e;
                    if (token < from || token >= to) p[i][e] = lowest();
                }
        }
        float maximum = lowest();
#pragma unroll
        for (int i = 0; i < 2 * kWarps; ++i) maximum = fmaxf(maximum, fmaxf(p[i][0], p[i][1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
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
                p[i][e] = exp2_of(p[i][e] - leaf_max);
                leaf_sum += p[i][e];
            }
        const unsigned values = shared + S::kValues + number % kStages * S::kTileBytes;
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

    // From a value of head lane / 4 to those of the two heads whose sums this lane holds.
    __device__ __forceinline__ void spread(float value, float (&to)[2]) const {
        to[0] = __shfl_sync(0xffffffffu, value, lane % 4 * 8);
        to[1] = __shfl_sync(0xffffffffu, value, lane % 4 * 8 + 4);
    }

    // The leaf is complete: its sum over all lanes.
    __device__ __forceinline__ void close_leaf() {
        leaf_sum += __shfl_xor_sync(0xffffffffu, leaf_sum, 1);
        leaf_sum += __shfl_xor_sync(0xffffffffu, leaf_sum, 2);
    }

    __device__ __forceinline__ void add_leaf_to_item(bool is_first) {
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

    __device__ __forceinline__ void write_partial(
        float* to, int heads, const float (&sums)[S::kSlices][4], float maximum, float sum) const {
#pragma unroll
        for (int s = 0; s < S::kSlices; ++s)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int head = lane % 4 * 2 + e % 2;
                const int dim = (warp * S::kSlices + s) * 16 + lane / 4 + e / 2 * 8;
                if (head < heads) to[head * S::kPartial + dim] = sums[s][e];
            }
        if (warp == 0 && lane % 4 == 0 && lane / 4 < heads) {
            to[lane / 4 * S::kPartial + kDim] = maximum;
            to[lane / 4 * S::kPartial + kDim + 1] = sum;
        }
    }

    __device__ __forceinline__ void write_item(const Place& place) const {
        const int heads = heads_of(place.pass);
        T* to = in.out + (static_cast<long long>(place.request) * in.num_heads + first_head(place.pass)) * kDim;
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

    // `leaves` more of an item's leaves are written; whoever writes the last ones adds all up, in their order.
    __device__ __forceinline__ void arrive(const Place& place, const Span& of, int base, int leaves) const {
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (thread == 0) {
            unsigned* count = num_written + place.request * passes + place.pass;
            is_last = atomicAdd(count, leaves) + leaves == of.leaves;
            if (is_last) *count = 0;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        merge(place, of, base);
    }

    // Each warp takes whole heads; a lane has kDim / 32 dimensions.
    __device__ void merge(const Place& place, const Span& of, int base) const {
        constexpr int kEach = kDim / 32, kAhead = 8;
        __shared__ int slots[kMaxLeaves];
        __shared__ int num_slots;
        if (warp == 0) {
            const int leaf_of_lane = min(lane, of.leaves - 1);
            const int owner = worker_of(leaf_of_lane, base, of, gridDim.x, total);
            const int number = slot_of(leaf_of_lane, owner, base, of, gridDim.x, total);
            const bool is_used = lane < of.leaves && (number > 0 || lane == 0);
            const unsigned used = __ballot_sync(0xffffffffu, is_used);
            if (is_used) slots[__popc(used & ((1u << lane) - 1))] = owner * (kMaxLeaves + 1) + number;
            if (lane == 0) num_slots = __popc(used);
        }
        __syncthreads();
        const int heads = heads_of(place.pass), stride = min(kHeads, group) * S::kPartial, count = num_slots;
        T* to = in.out + (static_cast<long long>(place.request) * in.num_heads + first_head(place.pass)) * kDim;
        for (int head = warp; head < heads; head += kWarps) {
            float sums[kEach], maximum = 0.0f, sum = 0.0f;
            for (int i = 0; i < count; i += kAhead) {
                Pack<float, kEach> parts[kAhead];
                float maxima[kAhead], totals[kAhead];
#pragma unroll
                for (int j = 0; j < kAhead; ++j) {
                    const float* from = in.partials + static_cast<long long>(slots[min(i + j, count - 1)]) * stride +
                                        head * S::kPartial;
#pragma unroll
                    for (int e = 0; e < kEach; ++e) parts[j].elements[e] = __ldcg(from + lane * kEach + e);
                    maxima[j] = __ldcg(from + kDim);
                    totals[j] = __ldcg(from + kDim + 1);
                }
#pragma unroll
                for (int j = 0; j < kAhead; ++j) {
                    if (i + j >= count) continue;
                    if (i + j == 0) {
                        maximum = maxima[j], sum = totals[j];
#pragma unroll
                        for (int e = 0; e < kEach; ++e) sums[e] = parts[j].elements[e];
                        continue;
                    }
                    const Fold fold(maximum, maxima[j]);
                    maximum = fold.maximum;
                    sum = folded(sum, fold.kept, totals[j], fold.added);
#pragma unroll
                    for (int e = 0; e < kEach; ++e)
                        sums[e] = folded(sums[e], fold.kept, parts[j].elements[e], fold.added);
                }
            }
            const float factor = __frcp_rn(sum);
            Pack<T, kEach> result;
#pragma unroll
            for (int e = 0; e < kEach; ++e) result.elements[e] = from_float<T>(sums[e] * factor);
            store<T, kEach>(to + head * kDim + lane * kEach, result);
        }
        __syncthreads();
    }

    __device__ __forceinline__ void run(const Share& share) {
        const int count = share.end - share.begin;
        if (count <= 0) return;
        at = Place{share.request, share.pass, share.tile, in.lengths[share.request]};
        span = span_of<S::kTile>(at.length, in.window);
        if (at.tile == span.tiles) {  // the nearest leaf was the next item's first
            --at.tile;
            advance();
        }
        prepare();
#pragma unroll
        for (int i = 0; i < kStages; ++i) copy(i, count);
        wait_for_copies<kStages - 1>();
        __syncthreads();
        score(0);
        bool is_whole = false;  // whether this worker has the item from its begin on
        int leaves = 0;
        for (int t = 0; t < count; ++t) {
            wait_for_copies<kStages - 2>();
            __syncthreads();
            const Place place = places[t % kPlaces];
            const Span of = span_of<S::kTile>(place.length, in.window);
            copy(t + kStages, count);
            if (t + 1 < count) score(t + 1);
            const int in_leaf = place.tile & ((1 << of.leaf_shift) - 1), token = of.first + place.tile * S::kTile;
            attend(t, in_leaf == 0, of.start - token, place.length - token);
            if (t == 0 || place.tile == 0) {
                is_whole = place.tile == 0;
                leaves = 0;
            }
            const bool ends_item = place.tile + 1 == of.tiles;
            if (ends_item || in_leaf + 1 == 1 << of.leaf_shift) {
                close_leaf();
                if (is_whole)
                    add_leaf_to_item(leaves == 0);
                else
                    write_partial(slot(worker, 1 + leaves), heads_of(place.pass), leaf, leaf_max, leaf_sum);
                ++leaves;
            }
            if (ends_item && is_whole) {
                write_item(place);
            } else if (ends_item || t + 1 == count) {
                if (is_whole) write_partial(slot(worker, 0), heads_of(place.pass), item, item_max, item_sum);
                arrive(place, of, share.begin + t - place.tile, leaves);
            }
        }
        wait_for_copies<0>();
    }
};

template <typename T, int kDim, int kWarps, int kStages> __device__ __forceinline__ void decode(const Inputs<T>& in) {
    using S = Shape<kDim, kWarps, kStages>;
    extern __shared__ uint4 memory[];
    __shared__ Share share;
    __shared__ Place places[kPlaces];
    let_next_begin();
    wait_for_previous();
    const int group = in.num_heads / in.num_kv_heads, slices = (group + kHeads - 1) / kHeads;
    const int passes = in.num_kv_heads * slices, each = gridDim.x / in.num_processors;
    // Blocks that run on one processor, as these are handed out, get neighbouring shares: together the same amount.
    const int worker = blockIdx.x % in.num_processors * each + blockIdx.x / in.num_processors;
    const int total = find_share<S::kTile>(share, in.lengths, in.batch, passes, in.window, worker);
    zero_empty_requests(in, in.num_heads * kDim);
    Decoder<T, kDim, kWarps, kStages> decoder{in, shared_address(memory),
                                              reinterpret_cast<float*>(memory + S::kScores / 16), places, group, slices,
                                              passes, worker, total, static_cast<int>(threadIdx.x),
                                              static_cast<int>(threadIdx.x) % 32, static_cast<int>(threadIdx.x) / 32};
    decoder.run(share);
}

// Any dtype, block size and head up to 32 * kMaxParts wide: a block of kGeneralWarps warps per request and query head,
// whose warps take turns at kAtOnce tokens each.
constexpr int kMaxParts = 8, kGeneralWarps = 8, kAtOnce = 4;

template <typename T>
__device__ __forceinline__ void attend_head(const Inputs<T>& in, int head_dim, int block_size) {
    __shared__ float parts[kGeneralWarps][32 * kMaxParts], maxima[kGeneralWarps], sums[kGeneralWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, request = blockIdx.x, head = blockIdx.y;
    const int length = in.lengths[request], kv_head = head / (in.num_heads / in.num_kv_heads);
    const int start = in.window > 0 && length > in.window ? length - in.window : 0;
    const int* table = in.block_tables + static_cast<long long>(request) * in.table_stride;
    const long long row_size = static_cast<long long>(in.num_kv_heads) * head_dim;
    const long long at = (static_cast<long long>(request) * in.num_heads + head) * head_dim;
    float query[kMaxParts], sum_of_values[kMaxParts] = {}, maximum = lowest(), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxParts; ++i)
        query[i] = lane + 32 * i < head_dim ? to_float(in.query[at + lane + 32 * i]) : 0.0f;
    for (int first = start + warp * kAtOnce; first < length; first += kGeneralWarps * kAtOnce) {
        float scores[kAtOnce];
        long long rows[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int token = min(first + j, length - 1);
            rows[j] = (static_cast<long long>(table[token / block_size]) * block_size + token % block_size) * row_size +
                      kv_head * head_dim;
            scores[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < kMaxParts; ++i)
                if (lane + 32 * i < head_dim) scores[j] += query[i] * to_float(in.keys[rows[j] + lane + 32 * i]);
        }
        float new_maximum = maximum;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            for (int offset = 16; offset; offset /= 2) scores[j] += __shfl_xor_sync(0xffffffffu, scores[j], offset);
            scores[j] *= in.scale;
            if (in.softcap > 0.0f) scores[j] = in.softcap * tanhf(scores[j]);
            if (first + j >= length) scores[j] = lowest();
            new_maximum = fmaxf(new_maximum, scores[j]);
        }
        const float kept = exp2f(maximum - new_maximum);
        maximum = new_maximum;
        sum *= kept;
#pragma unroll
        for (int i = 0; i < kMaxParts; ++i) sum_of_values[i] *= kept;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const float p = exp2f(scores[j] - maximum);
            sum += p;
#pragma unroll
            for (int i = 0; i < kMaxParts; ++i)
                if (lane + 32 * i < head_dim) sum_of_values[i] += p * to_float(in.values[rows[j] + lane + 32 * i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kMaxParts; ++i) parts[warp][lane + 32 * i] = sum_of_values[i];
    if (lane == 0) maxima[warp] = maximum, sums[warp] = sum;
    __syncthreads();
    float highest = lowest(), total = 0.0f;
    for (int w = 0; w < kGeneralWarps; ++w) highest = fmaxf(highest, maxima[w]);
    for (int w = 0; w < kGeneralWarps; ++w) total += length > 0 ? sums[w] * exp2f(maxima[w] - highest) : 0.0f;
    for (int dim = threadIdx.x; dim < head_dim; dim += blockDim.x) {
        float value = 0.0f;
        for (int w = 0; w < kGeneralWarps; ++w)
            value += length > 0 ? parts[w][dim] * exp2f(maxima[w] - highest) : 0.0f;
        in.out[at + dim] = from_float<T>(length > 0 ? value / total : 0.0f);
    }
}

}  // namespace

#define GENERAL(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * kGeneralWarps) paged_decode_attention_##NAME(                  \
        const T* query, const T* keys, const T* values, const int* block_tables, const int* lengths, T* out,         \
        int num_heads, int num_kv_heads, int head_dim, int block_size, int table_stride, float scale, float softcap, \
        int window) {                                                                                                \
        let_next_begin();                                                                                            \
        wait_for_previous();                                                                                         \
        attend_head<T>({query, keys, values, block_tables, lengths, out, nullptr, 0, num_heads, num_kv_heads, 0,     \
                        table_stride, scale, softcap, window, 0},                                                    \
                       head_dim, block_size);                                                                        \
    }
FOR_EACH_DTYPE(GENERAL)

#define STREAMING(NAME, T, DIM, WARPS, STAGES)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                         \
        paged_decode_attention_##NAME##_##DIM##_##WARPS##_##STAGES(                                                  \
            const T* query, const T* keys, const T* values, const int* block_tables, const int* lengths, T* out,     \
            float* partials, int batch, int num_heads, int num_kv_heads, int block_shift, int table_stride,          \
            float scale, float softcap, int window, int num_processors) {                                            \
        decode<T, DIM, WARPS, STAGES>({query, keys, values, block_tables, lengths, out, partials, batch, num_heads,  \
                                       num_kv_heads, block_shift, table_stride, scale, softcap, window,              \
                                       num_processors});                                                             \
    }
#define DIMS(NAME, T)             \
    STREAMING(NAME, T, 64, 4, 2)  \
    STREAMING(NAME, T, 64, 4, 3)  \
    STREAMING(NAME, T, 128, 4, 2) \
    STREAMING(NAME, T, 128, 4, 3)
DIMS(float16, float16)
DIMS(bfloat16, bfloat16)
STREAMING(bfloat16, bfloat16, 128, 4, 6)
STREAMING(bfloat16, bfloat16, 128, 2, 4)
STREAMING(bfloat16, bfloat16, 128, 2, 6)
STREAMING(bfloat16, bfloat16, 128, 8, 3)
