// The streaming kernel of paged_decode_attention: 16-bit caches, heads of 64 or 128, blocks of a power of two from 16
// on.
//
// A persistent grid of several blocks of threads per multiprocessor, each with one unit after the other (see the
// units): the first two by its own number, the others as they are asked for. A block's clerk, its last warp, finds
// units and says which partial results are written; the other warps compute, and never wait for memory but for keys and
// values. Each of them owns 16 tokens of every tile: it copies their keys and values to a ring of its own, kStages
// tiles ahead and into the next unit, scores them, and adds up the values. Only at the end of a chunk do the warps'
// sums meet.
//
// All but queries and the requests' newest tokens is read before the kernel before this one has ended.
#pragma once

#include "dependent.cuh"
#include "early.cuh"
#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_clerk.cuh"
#include "paged_decode_attention_results.cuh"
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

// In shared memory a row's chunks change places, so that neither eight rows' chunks of one number lie on the same
// banks, nor four chunks that stand together in two neighbouring rows.
__device__ __forceinline__ constexpr int place_of(int row) { return (row & 1) << 2 | (row >> 1 & 3); }

template <typename T, int kDim, int kWarps, int kStages> struct Decoder {
    using S = Shape<kDim, kWarps, kStages>;
    const Inputs<T>& in;
    Board<kWarps>& board;
    unsigned char* memory;
    unsigned ring;  // this warp's
    unsigned long long policy;
    int lane, warp;
    Results<T, kDim, kWarps> results;

    // Sums over values, [dimension, head]: as the tensor cores have them, of heads 2 * (lane % 4) and the next one. So
    // are the maxima; `sums` only of this lane's tokens.
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
        const long long row = static_cast<long long>(unit.request) * in.num_heads() + unit.head + lane / 4;
        const T* from = in.query + row * kDim + lane % 4 * 8;
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
            const bool completes = is_there ? decode(number, stage) : hear_clerk();
            if (completes) results.merge(board.unit(number - 1));
            if (!is_there) return;
        }
    }

    // A unit, chunk by chunk; returns what the clerk says. Where it lacks tiles to the depth of the ring there are
    // steps without any: so copies never run further than into the next unit.
    __device__ __forceinline__ bool decode(int number, int& stage) {
        const Unit& unit = board.unit(number);
        const int steps = max(unit.tiles, kStages);
        bool completes = false;
#pragma unroll 1
        for (int chunk = 0, step = 0; step < steps; ++chunk) {
            const int end = unit.end_of(chunk);
            const bool is_last = end == unit.tiles;
            const Rows next = attend(number, step, is_last ? steps : end, steps, stage);
            leave_sums(shared_address(memory) + free_slot(warp, stage), unit.heads);
            meet(is_last);
            if (is_last) completes = board.completes;
            results.combine(unit, chunk, is_last, memory + free_slot(0, stage), S::kRing);
            meet(is_last);
            copy(in.values, next, ring + stage * 2 * S::kSlot + S::kSlot);
            commit_copies();
            stage = after(stage);
        }
        return completes;
    }

    __device__ __forceinline__ void meet(bool with_clerk) const {
        if (with_clerk)
            __syncthreads();
        else
            meet_first<32 * kWarps>();
    }

    // Where there is no unit.
    __device__ __forceinline__ bool hear_clerk() const {
        meet(true);
        const bool completes = board.completes;
        meet(true);
        return completes;
    }

    __device__ __forceinline__ static int after(int stage) { return stage + 1 < kStages ? stage + 1 : 0; }

    // From `step` to `end`, a chunk. After it, in `stage`, the slot of values is left free; returns the rows that
    // belong there.
    __device__ __forceinline__ Rows attend(int number, int& step, int end, int steps, int& stage) {
        const int tiles = board.unit(number).tiles;
#pragma unroll
        for (int e = 0; e < 2; ++e) maxima[e] = lowest(), sums[e] = 0.0f;
#pragma unroll
        for (int i = 0; i < kDim / 16; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) values[i][e] = 0.0f;
#pragma unroll 1
        for (;;) {
            const unsigned slot = ring + stage * 2 * S::kSlot;
            const Rows rows = rows_of(number, step), next = rows_ahead(number, step, steps);
            float scores[4] = {};
            wait_for_copies<2 * kStages - 1>();
            __syncwarp();
            if (rows.are_seen()) score(slot, scores);
            if (++step == tiles) load_queries(number + 1);
            __syncwarp();
            copy(in.keys, next, slot);
            commit_copies();
            if (rows.are_seen()) weigh(scores, rows);
            wait_for_copies<2 * kStages - 1>();
            __syncwarp();
            if (rows.are_seen()) add_values(slot + S::kSlot, scores);
            __syncwarp();
            if (step == end) return next;
            copy(in.values, next, slot + S::kSlot);
            commit_copies();
            stage = after(stage);
        }
    }

    // Where a warp leaves its sums: the slot of values that was read last.
    __device__ __forceinline__ static int free_slot(int of_warp, int stage) {
        return of_warp * S::kRing + stage * 2 * S::kSlot + S::kSlot;
    }

    __device__ __forceinline__ void leave_sums(unsigned slot, int heads) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int head = lane % 4 * 2 + e;
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) sums[e] += __shfl_xor_sync(kAllLanes, sums[e], offset);
            if (head >= heads) continue;
            if (lane / 4 == 0) board.maxima[warp][head] = maxima[e], board.sums[warp][head] = sums[e];
            const unsigned to = slot + place_in_sums<kDim>(head, lane / 4) * 4;
#pragma unroll
            for (int i = 0; i < kDim / 16; ++i) {
                store_shared(to ^ i * 64, values[i][e]);
                store_shared(to ^ (i * 64 + 32), values[i][e + 2]);
            }
        }
    }

};

template <typename T, int kDim, int kWarps, int kStages> __device__ __forceinline__ void stream(const Inputs<T>& in) {
    using S = Shape<kDim, kWarps, kStages>;
    // Addresses in rows of 256 bytes, and in a head's 512 bytes of sums, are made by xor.
    extern __shared__ __align__(512) unsigned char memory[];
    __shared__ Board<kWarps> board;
    let_next_begin();
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(kAllLanes, thread / 32, 0);
    const Units<T, S::kTile> units(in, lane, gridDim.x);
    Clerk<T, kDim, kWarps> clerk{in, board, units, lane, units.total <= 2 * static_cast<int>(gridDim.x)};
    if (warp < 2) clerk.publish(warp, blockIdx.x + warp * gridDim.x);
    __syncthreads();
    if (warp == kWarps) {
        wait_for_previous();
        clerk.run();
        return;
    }
    Decoder<T, kDim, kWarps, kStages>{
        in,   board, memory, shared_address(memory) + warp * S::kRing, read_once_policy(),
        lane, warp,  {in, board, thread}}.run();
}

}  // namespace
