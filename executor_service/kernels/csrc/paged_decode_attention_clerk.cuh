// A block's clerk in paged_decode_attention: one warp that finds the block's units, looks up where their rows lie, and
// counts which partial results are written, so that those who compute wait for none of that.
#pragma once

#include "dependent.cuh"
#include "numbers.cuh"
#include "paged_decode_attention.cuh"
#include "paged_decode_attention_units.cuh"

namespace {

constexpr int kMaxItems = 1 << 16;
constexpr int kUnitsKept = 8, kTablesKept = 4;  // powers of two

// Units of each item whose partial results are written, and units that have been asked for. All are zero between
// launches: they count modulo what there is to count. Two launches must not run at the same time: on one stream they do
// not, launched dependently or not.
__device__ unsigned num_written[kMaxItems], num_asked_for;

// What the warps of a block know in common. The clerk writes of unit n + 2 while unit n is computed; all else is
// written before the first barrier at the end of a unit and read before the second.
template <int kWarps> struct alignas(256) Board {
    Unit units[kUnitsKept];
    int blocks[kTablesKept][kWarps][kMostTiles];  // in which 16 tokens of each tile lie
    float maxima[kWarps][kHeads], sums[kWarps][kHeads];
    bool completes;  // whether the unit before was the last of its item to be written

    __device__ __forceinline__ const Unit& unit(int number) const { return units[number % kUnitsKept]; }

    __device__ __forceinline__ const int* blocks_of(int number, int warp) const {
        return blocks[number % kTablesKept][warp];
    }
};

template <typename T, int kDim, int kWarps> struct Clerk {
    static constexpr int kTile = 16 * kWarps;

    const Inputs<T>& in;
    Board<kWarps>& board;
    const Units<T, kTile>& units;
    int lane;
    bool is_exhausted;  // nothing is handed out any more

    // As many barriers as the other warps wait at: two per unit, and once more two.
    __device__ __forceinline__ void run() {
        zero_empty_requests();
#pragma unroll 1
        for (int number = 0;; ++number) {
            const bool is_there = board.unit(number).tiles > 0;
            const bool completes = number > 0 && announce(board.unit(number - 1));
            if (is_there) publish(number + 2, next_id());
            if (lane == 0) board.completes = completes;
            __syncthreads();
            __syncthreads();
            if (!is_there) return;
        }
    }

    __device__ __forceinline__ void publish(int number, int id) {
        const Unit unit = units.find(id);
        const int* table = in.block_tables + static_cast<long long>(unit.request) * in.table_stride;
#pragma unroll
        for (int first = 0; first < kMostTiles; first += 32) {
            const int tile = first + lane;
            int blocks[kWarps];
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const int token = min(unit.token + tile * kTile + 16 * w, unit.length - 1);
                blocks[w] = tile < unit.tiles ? load_past_l1(table + (token >> in.block_shift)) : 0;
            }
#pragma unroll
            for (int w = 0; w < kWarps; ++w) board.blocks[number % kTablesKept][w][tile] = blocks[w];
            if (first + 32 >= unit.tiles) break;
        }
        if (lane == 0) board.units[number % kUnitsKept] = unit;
        __syncwarp();
    }

    // Every block asks once in vain, so the number of questions is known, and the last one makes the counter zero.
    __device__ __forceinline__ int next_id() {
        const int blocks = gridDim.x;
        if (is_exhausted) return units.total;
        int id = 0;
        if (lane == 0) id = 2 * blocks + atomicInc(&num_asked_for, units.total - blocks - 1);
        id = __shfl_sync(kAllLanes, id, 0);
        is_exhausted = id >= units.total;
        return id;
    }

    // A unit's partial result is written: whether its item's others were before. Then the counter is zero again.
    __device__ __forceinline__ bool announce(const Unit& unit) const {
        if (unit.places == 1) return false;
        bool is_last = false;
        if (lane == 0) {
            fence();
            is_last = atomicInc(num_written + unit.item, unit.places - 1) == unit.places - 1;
            fence();
        }
        return is_last;
    }

    __device__ __forceinline__ void zero_empty_requests() const {
        const int width = in.num_heads() * kDim;
#pragma unroll 1
        for (int request = blockIdx.x; request < in.batch; request += gridDim.x) {
            if (load_past_l1(in.lengths + request) > 0) continue;
            for (int i = lane; i < width; i += 32)
                in.out[static_cast<long long>(request) * width + i] = from_float<T>(0.0f);
        }
    }
};

}  // namespace
