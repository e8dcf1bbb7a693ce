// The streaming kernel of paged_decode_attention: 16-bit caches, heads of 64 or 128, blocks of a power of two from 16 on.
//
// A persistent grid of several blocks of threads per multiprocessor, each with one unit after the other (see the units):
// the first two by its own number, the others as they are asked for. A block's clerk, its last warp, finds units and says
// which partial results are written; the other warps compute, and never wait for memory but for keys and values. Each
// of them owns 16 tokens of every tile: it copies their keys and values to a ring of its own, kStages tiles ahead and into
// the next unit, scores them, and adds up the values. Only at the end of a unit do the warps' sums meet.
//
// All but queries and the requests' newest tokens is read before the kernel before this one has ended.
#pragma once

#include "dependent.cuh"
#include "early.cuh"
#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_clerk.cuh"
#include "paged_decode_attention_units.cuh"

namespace {

// Everything that follows from the shape of a head and the size of a tile.
template <int kDim, int kWarps, int kStages> struct Shape {
    static constexpr int kTile = 16 * kWarps;
    static constexpr int kRowChunks = kDim / 8, kRowBytes = 2 * kDim;  // chunks of 16 bytes
    static constexpr int kRowStep = 32 / kRowChunks;                   // rows that a warp copies at once
    static constexpr int kSlot = 16 * kRowBytes;  // keys, or values, of a warp's tokens of a tile
    static constexpr int kRing = kStages * 2 * kSlot;
    static_assert(kSlot == kHeads * kDim * 4);  // a slot has room for a warp's sums, too
};

// Rows of 16 tokens in a cache: they begin at element `at`, and those in [begin, end) are seen.
struct Rows {
    long long at;
    int begin, end;

    __device__ __forceinline__ bool are_seen() const { return begin < 16 && end > 0; }

    __device__ __forceinline__ bool are_whole() const { return begin <= 0 && end >= 16; }

    __device__ __forceinline__ bool have_newest() const { return end > 0 && end <= 16; }
};

// In shared memory a row's chunks change places, so that neither eight rows' chunks of one number lie on the same banks,
// nor four chunks that stand together in two neighbouring rows.
__device__ __forceinline__ constexpr int place_of(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

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
};

template <typename T, int kDim, int kWarps, int kStages> struct Decoder {
    using S = Shape<kDim, kWarps, kStages>;
    static constexpr int kMergedAtOnce = 8;
    static constexpr int kPartial = kDim + 4;  // floats of one head's partial result: sums, maximum, sum, two unused

    const Inputs<T>& in;
    Board<kWarps>& board;
    unsigned char* memory;
    unsigned ring;  // this warp's
    unsigned long long policy;
    int thread, lane, warp;

    // Sums over values, [dimension, head]: as the tensor cores have them, of heads 2 * (lane % 4) and the next one. So are
    // the maxima; `sums` only of this lane's tokens.
    float values[kDim / 16][4], maxima[2], sums[2];
    unsigned queries[kDim / 32][4];  // of head lane / 4, chunks 4 * i + lane % 4

    __device__ __forceinline__ Rows rows_of(int number, int tile) const {
        const Unit& unit = board.unit(number);
        if (tile >= unit.tiles) return {0, 0, 0};
        const int token = unit.token + tile * S::kTile + 16 * warp, row_size = in.num_kv_heads * kDim;
        const int in_block = token & ((1 << in.block_shift) - 1);
        const long long block = board.blocks_of(number, warp)[tile];
        return {block * (row_size << in.block_shift) + in_block * row_size + unit.kv_head * kDim, unit.start - token,
                unit.length - token};
    }

    // Of the tile that is to be computed kStages steps after `step`.
    __device__ __forceinline__ Rows rows_ahead(int number, int step, int steps) const {
        const int ahead = step + kStages;
        return ahead < steps ? rows_of(number, ahead) : rows_of(number + 1, ahead - steps);
    }

    // Starts to copy rows to a slot; those that are not seen become zeros.
    __device__ __forceinline__ void copy(const T* cache, const Rows& rows, unsigned to) const {
        if (!rows.are_seen()) return;
        const int row_size = in.num_kv_heads * kDim, row = lane / S::kRowChunks, chunk = lane % S::kRowChunks;
        const T* from = cache + rows.at + row * row_size + chunk * 8;
        to += row * S::kRowBytes + ((chunk ^ place_of(row)) << 4);
        if (rows.are_whole()) {
#pragma unroll
            for (int i = 0; i < 16; i += S::kRowStep)
                copy_async((to ^ (place_of(i) << 4)) + i * S::kRowBytes, from + i * row_size, true, policy);
        } else {
#pragma unroll 1
            for (int i = 0; i < 16; i += S::kRowStep)
                copy_async((to ^ (place_of(i) << 4)) + i * S::kRowBytes, from + i * row_size,
                           row + i >= rows.begin && row + i < rows.end, policy);
        }
    }

    // The first copies, and queries: what the kernel before may write, the newest tokens' rows among it, only once that
    // has ended. So much is on its way then that those rows may be waited for.
    __device__ __forceinline__ void fill() {
        const int steps = max(board.unit(0).tiles, kStages);
        bool is_any_late = false;
#pragma unroll 1
        for (int i = 0; i < 2 * kStages; ++i) {
            if (i == kStages) {
                wait_for_previous();
                load_queries(0);
            }
            const bool is_late = i >= kStages;
            const int stage = is_late ? i - kStages : i;
            Rows rows = rows_ahead(0, stage - kStages, steps);
            if (rows.have_newest() && !is_late) bring_near(rows);
            if (rows.have_newest() != is_late) rows = {0, 0, 0};
            is_any_late |= is_late && rows.are_seen();
            copy(in.keys, rows, ring + stage * 2 * S::kSlot);
            if (!is_late) commit_copies();
            copy(in.values, rows, ring + stage * 2 * S::kSlot + S::kSlot);
            if (!is_late) commit_copies();
        }
        if (!is_any_late) return;
        commit_copies();
        wait_for_copies<0>();
    }

    __device__ __forceinline__ void bring_near(const Rows& rows) const {
        const long long at = rows.at + lane / 2 * (in.num_kv_heads * kDim) + lane % 2 * (kDim / 2);
        ::bring_near(in.keys + at);
        ::bring_near(in.values + at);
    }

    __device__ __forceinline__ void load_queries(int number) {
        const Unit& unit = board.unit(number);
        const T* from = in.query + (static_cast<long long>(unit.request) * in.num_heads() + unit.head + lane / 4) * kDim +
                        lane % 4 * 8;
        const bool is_there = lane / 4 < unit.heads;
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) queries[i][e] = 0;
            if (is_there) load_past_l1(queries[i], from + 32 * i);
        }
    }

    // Scores of 16 tokens: those of tokens lane / 4 and, from 2 on, lane / 4 + 8.
    __device__ __forceinline__ void score(unsigned slot, float (&scores)[4]) const {
        const int row = lane / 4;
        const unsigned from = slot + row * S::kRowBytes + ((lane % 4 ^ place_of(row)) << 4);
        float others[4] = {};
#pragma unroll
        for (int i = 0; i < kDim / 32; ++i) {
            unsigned upper[4], lower[4];
            load_shared(upper, from ^ (i << 6));
            load_shared(lower, (from ^ (i << 6)) + 8 * S::kRowBytes);
            multiply_add<T>(scores, upper[0], lower[0], upper[1], lower[1], queries[i][0], queries[i][1]);
            multiply_add<T>(others, upper[2], lower[2], upper[3], lower[3], queries[i][2], queries[i][3]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[e] += others[e];
    }

    // Scores become exponentials relative to the maximum so far, to which the sums are brought, too.
    __device__ __forceinline__ void weigh(float (&scores)[4], const Rows& rows) {
        float factor = in.scale, higher[2];
        if (in.softcap > 0.0f) {
            factor = in.softcap;
#pragma unroll
            for (int e = 0; e < 4; ++e) scores[e] = tanh_of(scores[e] * in.scale);
        }
        if (!rows.are_whole()) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = lane / 4 + e / 2 * 8;
                if (row < rows.begin || row >= rows.end) scores[e] = lowest();
            }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            higher[e] = fmaxf(scores[e], scores[e + 2]);
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2)
                higher[e] = fmaxf(higher[e], __shfl_xor_sync(kAllLanes, higher[e], offset));
            higher[e] = fmaxf(higher[e] * factor, maxima[e]);
        }
        if (__any_sync(kAllLanes, higher[0] > maxima[0] || higher[1] > maxima[1])) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float kept = exp2_of(maxima[e] - higher[e]);
                maxima[e] = higher[e];
                sums[e] *= kept;
#pragma unroll
                for (int i = 0; i < kDim / 16; ++i) values[i][e] *= kept, values[i][e + 2] *= kept;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            scores[e] = exp2_of(__fmaf_rn(scores[e], factor, -maxima[e % 2]));
            sums[e % 2] += scores[e];
        }
    }

    __device__ __forceinline__ void add_values(unsigned slot, const float (&weights)[4]) {
        const unsigned low = transposed(pair_of<T>(weights[0], weights[1]));
        const unsigned high = transposed(pair_of<T>(weights[2], weights[3]));
        const unsigned from = slot + (lane / 16 * 8 + lane % 8) * S::kRowBytes +
                              ((lane / 8 % 2 ^ place_of(lane % 8)) << 4);
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i) {
            unsigned part[4];
            load_matrices_transposed(part, from ^ (i << 5));
            multiply_add<T>(values[i], part[0], part[1], part[2], part[3], low, high);
        }
    }

    __device__ __forceinline__ void run() {
        fill();
        int stage = 0;
#pragma unroll 1
        for (int number = 0;; ++number) {
            const bool is_there = board.unit(number).tiles > 0;
            Rows next{};
            if (is_there) {
                next = attend(number, stage);
                leave_sums(free_slot(warp, stage), board.unit(number).heads);
            }
            __syncthreads();
            const bool completes = board.completes;
            if (is_there) combine(board.unit(number), stage);
            __syncthreads();
            copy(in.values, next, ring + stage * 2 * S::kSlot + S::kSlot);
            commit_copies();
            stage = after(stage);
            if (completes) merge(board.unit(number - 1));
            if (!is_there) return;
        }
    }

    __device__ __forceinline__ static int after(int stage) { return stage + 1 < kStages ? stage + 1 : 0; }

    // All tiles of a unit, and nothing for as many as it lacks to the depth of the ring: so copies never run further than
    // into the next unit. After the last one, in `stage`, the slot of values is left free; returns the rows that belong
    // there.
    __device__ __forceinline__ Rows attend(int number, int& stage) {
        const int tiles = board.unit(number).tiles, steps = max(tiles, kStages);
#pragma unroll
        for (int e = 0; e < 2; ++e) maxima[e] = lowest(), sums[e] = 0.0f;
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) values[i][e] = 0.0f;
#pragma unroll 1
        for (int step = 0;; ++step) {
            const unsigned slot = ring + stage * 2 * S::kSlot;
            const Rows rows = rows_of(number, step), next = rows_ahead(number, step, steps);
            float scores[4] = {};
            wait_for_copies<2 * kStages - 1>();
            __syncwarp();
            if (rows.are_seen()) score(slot, scores);
            if (step + 1 == tiles) load_queries(number + 1);
            __syncwarp();
            copy(in.keys, next, slot);
            commit_copies();
            if (rows.are_seen()) weigh(scores, rows);
            wait_for_copies<2 * kStages - 1>();
            __syncwarp();
            if (rows.are_seen()) add_values(slot + S::kSlot, scores);
            __syncwarp();
            if (step + 1 == steps) return next;
            copy(in.values, next, slot + S::kSlot);
            commit_copies();
            stage = after(stage);
        }
    }

    // Where a warp leaves its sums: the slot of values that was read last.
    __device__ __forceinline__ float* free_slot(int of_warp, int stage) const {
        return reinterpret_cast<float*>(memory + of_warp * S::kRing + stage * 2 * S::kSlot + S::kSlot);
    }

    // Where dimension `dim` of a head lies among a warp's sums: such that lanes that write together meet different banks.
    __device__ __forceinline__ static int place_in_sums(int head, int dim) { return head * kDim + (dim ^ head / 2 * 8); }

    __device__ __forceinline__ void leave_sums(float* to, int heads) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int head = lane % 4 * 2 + e;
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], offset);
            if (head >= heads) continue;
            if (lane / 4 == 0) board.maxima[warp][head] = maxima[e], board.sums[warp][head] = sums[e];
#pragma unroll
            for (int i = 0; i < kDim / 16; ++i) {
                to[place_in_sums(head, 16 * i + lane / 4)] = values[i][e];
                to[place_in_sums(head, 16 * i + 8 + lane / 4)] = values[i][e + 2];
            }
        }
    }

    // The sums of all warps, in order.
    __device__ __forceinline__ void combine(const Unit& unit, int stage) const {
#pragma unroll 1
        for (int i = thread; i < unit.heads * (kDim / 4); i += 32 * kWarps) {
            const int head = i / (kDim / 4), dim = i % (kDim / 4) * 4;
            Total total;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float* part = free_slot(w, stage) + place_in_sums(head, dim);
                total.add(load<float, 4>(part), board.maxima[w][head], board.sums[w][head]);
            }
            if (unit.chunks == 1)
                write(unit, head, dim, total);
            else
                write_partial(partial_of(unit, unit.chunk) + head * kPartial, dim, total);
        }
    }

    // The partial results of all chunks, in order.
    __device__ __forceinline__ void merge(const Unit& unit) const {
#pragma unroll 1
        for (int i = thread; i < unit.heads * (kDim / 4); i += 32 * kWarps) {
            const int head = i / (kDim / 4), dim = i % (kDim / 4) * 4;
            Total total;
#pragma unroll 1
            for (int first = 0; first < unit.chunks; first += kMergedAtOnce) {
                Pack<float, 4> parts[kMergedAtOnce], about[kMergedAtOnce];
#pragma unroll
                for (int k = 0; k < kMergedAtOnce; ++k) {
                    const float* part = partial_of(unit, min(first + k, unit.chunks - 1)) + head * kPartial;
                    parts[k] = load_past_l1(part + dim);
                    about[k] = load_past_l1(part + kDim);
                }
#pragma unroll
                for (int k = 0; k < kMergedAtOnce; ++k)
                    if (first + k < unit.chunks) total.add(parts[k], about[k].elements[0], about[k].elements[1]);
            }
            write(unit, head, dim, total);
        }
    }

    // Chunk `chunk` of the unit's item.
    __device__ __forceinline__ float* partial_of(const Unit& unit, int chunk) const {
        const int id = unit.id + (chunk - unit.chunk) * in.passes;
        return in.partials + static_cast<long long>(id) * min(kHeads, in.group) * kPartial;
    }

    __device__ __forceinline__ void write_partial(float* to, int dim, const Total& total) const {
        store(to + dim, total.values);
        if (dim == 0) store(to + kDim, Pack<float, 4>{total.maximum, total.sum, 0.0f, 0.0f});
    }

    __device__ __forceinline__ void write(const Unit& unit, int head, int dim, const Total& total) const {
        const float factor = __frcp_rn(total.sum);
        Pack<T, 4> pack;
#pragma unroll
        for (int e = 0; e < 4; ++e) pack.elements[e] = from_float<T>(total.values.elements[e] * factor);
        store(in.out + (static_cast<long long>(unit.request) * in.num_heads() + unit.head + head) * kDim + dim, pack);
    }
};

template <typename T, int kDim, int kWarps, int kStages> __device__ __forceinline__ void stream(const Inputs<T>& in) {
    using S = Shape<kDim, kWarps, kStages>;
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ Board<kWarps> board;
    let_next_begin();
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(kAllLanes, thread / 32, 0);
    const Units<T, S::kTile> units(in, lane);
    Clerk<T, kDim, kWarps> clerk{in, board, units, lane, units.total <= 2 * static_cast<int>(gridDim.x)};
    if (warp < 2) clerk.publish(warp, blockIdx.x + warp * gridDim.x);
    __syncthreads();
    if (warp == kWarps) {
        wait_for_previous();
        clerk.run();
        return;
    }
    Decoder<T, kDim, kWarps, kStages>{
        in, board, memory, shared_address(memory) + warp * S::kRing, read_once_policy(), thread, lane, warp}.run();
}

}  // namespace
