// A product of few rows by tiles, as two producers and eight consumers of a block have it (small_linear_tiles.cu says how).
#pragma once

#include "ring.cuh"
#include "small_linear_tiles.cuh"

constexpr int kConsumers = 8;
constexpr int kThreads = 32 * (kConsumers + 2);

struct Task {
    const TensorMap *weight_map, *rest_map, *x_map;  // of whole tiles, of what a range has beyond them
    const void *bias, *residual;
    void* out;
    int features, range, steps;  // all, of a cluster; of a block and tile
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void bring_maps_near(const Task& task) {
    bring_near(task.weight_map);
    bring_near(task.rest_map);
    bring_near(task.x_map);
}

constexpr int kTileRows = 128;
constexpr int kColumns = 64;
constexpr int kRowBytes = 2 * kColumns;
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kScratchBytes = 512;  // of each consumer, to turn 32 x 8 elements

// What a warp has of shared memory: stages of x, then of weights, sums of other blocks, the consumers' scratch, barriers.
// So what a product reads beyond the rows that a copy has brought is shared memory, too; what becomes of it is not stored.
template <int kRows> struct Room {
    using Sums = Exchange<kRows / 8>;
    Ring weights, inputs;
    Sums exchange;
    unsigned scratch, sums_full, end;  // where barriers of all warps' sums begin

    __device__ Room(unsigned begin, int rows, int num_stages, int num_x_stages) {
        const int warp = threadIdx.x / 32, num_groups = (rows + 7) / 8;
        const unsigned x_bytes = num_groups * 8 * kRowBytes, tiles = begin + num_x_stages * x_bytes;
        const unsigned sums = tiles + num_stages * kTileBytes, scratches = sums + kConsumers * Sums::kBytes;
        const unsigned full = scratches + kConsumers * kScratchBytes, empty = full + 8 * num_stages;
        const unsigned x_full = empty + 8 * num_stages, x_empty = x_full + 8 * num_x_stages;
        const unsigned sums_empty = x_empty + 8 * num_x_stages + 8 * kConsumers;
        sums_full = x_empty + 8 * num_x_stages;
        weights = {tiles, kTileBytes, full, empty, num_stages, 0, 0};
        inputs = {begin, x_bytes, x_full, x_empty, num_x_stages, 0, 0};
        exchange = {sums + warp * Sums::kBytes, sums_full + 8 * warp, sums_empty + 8 * warp, cluster_rank(), num_groups, 0};
        scratch = scratches + warp * kScratchBytes;
        end = sums_empty + 8 * kConsumers;
    }

    // By one thread of the block.
    __device__ void init() const {
        weights.init(kConsumers);
        inputs.init(kConsumers);
        for (int i = 0; i < kConsumers; ++i) {
            init_barrier(sums_full + 8 * i, 1);
            init_barrier(sums_full + 8 * (kConsumers + i), kSplits - 1);
        }
    }
};

// What else consumers do: before a tile, from a lane's first feature on, with a tile's sums, and with what a lane has stored.
struct NoHooks {
    __device__ void begun(int, int) const {}
    template <int kCount> __device__ void added(float (&)[kCount]) const {}
    __device__ void stored(const unsigned (&)[4], int, long long) const {}
};

template <typename T, int kRows, bool kGated> struct Product {
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    using Sums = Exchange<kRows / 8>;
    // A warp has 16 rows of the tile: 16 features, or 8 and what they gate. It stores four matrices of 8 features x 8
    // rows of x at a time.
    static constexpr int kWarpUnits = kUnits / kConsumers;
    static constexpr int kChunkGroups = kGated ? 4 : 2;
    static constexpr int kChunks = (Sums::kOwn + kChunkGroups - 1) / kChunkGroups;

    const Task& task;
    const int rows, begin, end;  // rows of x, the cluster's features
    Ring &weights, &inputs;
    Sums& exchange;
    const unsigned scratch;

    __device__ Product(const Task& task, Room<kRows>& room, int rows)
        : task(task), rows(rows), begin(static_cast<int>(blockIdx.x) / kSplits * task.range),
          end(min(begin + task.range, task.features)), weights(room.weights), inputs(room.inputs),
          exchange(room.exchange), scratch(room.scratch) {}

    __device__ int column(int step) const { return (exchange.rank * task.steps + step) * kColumns; }

    // --- the two producers, a lane each ---

    __device__ void produce_weights() {
        const unsigned long long policy = read_once_policy();
        for (int first = begin; first < end; first += kUnits) {
            const int units = min(kUnits, begin + task.range - first);
            const TensorMap* map = units == kUnits ? task.weight_map : task.rest_map;
#pragma unroll 1
            for (int step = 0; step < task.steps; ++step) {
                wait_for_phase(weights.empty_here(), weights.parity ^ 1);
                const unsigned to = weights.here(), barrier = weights.full_here();
                arrive_expecting(barrier, units * (kTileRows / kUnits) * kRowBytes);
                if constexpr (kGated) copy_groups(to, map, column(step), first / 8, barrier, policy);
                else copy_box(to, map, column(step), first, barrier, policy);
                weights.advance();
            }
        }
    }

    __device__ void produce_inputs() {
        const unsigned long long policy = keep_policy();
        for (int first = begin; first < end; first += kUnits) {
#pragma unroll 1
            for (int step = 0; step < task.steps; ++step) {
                wait_for_phase(inputs.empty_here(), inputs.parity ^ 1);
                arrive_expecting(inputs.full_here(), inputs.stride);
                copy_box(inputs.here(), task.x_map, column(step), 0, inputs.full_here(), policy);
                inputs.advance();
            }
        }
    }

    // --- the consumers ---

    using Accumulators = float[kRows / 2];
    using Own = float[Sums::kOwn * 4];

    __device__ static int lane() { return threadIdx.x % 32; }
    // The same for all lanes, which the compiler cannot know: products want operands' places in uniform registers.
    __device__ static int group() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0); }

    // A stage that all warps have read is free for the next copy.
    __device__ static void give_back(unsigned weights_empty, unsigned inputs_empty) {
        if (lane() != 0) return;
        arrive(weights_empty);
        arrive(inputs_empty);
    }

    // The tensor cores have a step's products to go on with while the next stages are waited for.
    __device__ void multiply(Accumulators& sums) const {
        const unsigned half = group() * (kTileBytes / 2);
        unsigned weights_before = 0, inputs_before = 0;
#pragma unroll 1
        for (int i = 0; i < task.steps; ++i) {
            wait_for_phase(inputs.full_here(), inputs.parity);
            wait_for_phase(weights.full_here(), weights.parity);
            const unsigned long long a = descriptor(weights.here() + half), b = descriptor(inputs.here());
            begin_products();
#pragma unroll
            for (int k = 0; k < kColumns / 16; ++k) multiply_shared(T(), sums, a + 2 * k, b + 2 * k, i > 0 || k > 0);
            commit_products();
            if (i > 0) {
                wait_for_products<1>();
                give_back(weights_before, inputs_before);
            }
            weights_before = weights.empty_here(), inputs_before = inputs.empty_here();
            weights.advance();
            inputs.advance();
        }
        wait_for_products();
        give_back(weights_before, inputs_before);
        settle(sums);
    }

    // What a lane has of a chunk, eight features of one row of x.
    struct Place {
        int row, feature;
        bool exists;
    };
    __device__ Place place(int first, int chunk) const {
        const int matrix = lane() / 8, number = chunk * kChunkGroups + (kGated ? matrix : matrix / 2);
        const int row = (number * kSplits + exchange.rank) * 8 + lane() % 8, feature = first + (kGated ? 0 : matrix % 2 * 8);
        return {row, feature, number < Sums::kOwn && row < rows && feature < end};
    }
    __device__ long long offset(const Place& at) const {
        return static_cast<long long>(at.row) * task.features + at.feature;
    }

    using Chunks = unsigned[kChunks][4];

    __device__ void fetch_residual(Chunks& to, int first) const {
        const T* residual = static_cast<const T*>(task.residual);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const Place at = place(first, chunk);
            if (residual && at.exists) load_words(to[chunk], residual + offset(at));
            else to[chunk][0] = to[chunk][1] = to[chunk][2] = to[chunk][3] = 0;
        }
    }

    template <typename Hooks>
    __device__ void store_chunk(const unsigned (&parts)[4], int first, int chunk, Hooks& hooks) const {
        const Place at = place(first, chunk);
        unsigned row[4];
        turn_to_rows(row, parts, scratch);
        if (!at.exists) return;
        store_words(static_cast<T*>(task.out) + offset(at), row);
        hooks.stored(row, chunk, offset(at));
    }

    __device__ float bias_of(int feature) const {
        const T* bias = static_cast<const T*>(task.bias);
        return bias && feature < end ? to_float(bias[feature]) : 0.0f;
    }

    template <typename Hooks>
    __device__ void put_plain(const Own& own, const Chunks& residual, int first, Hooks& hooks) const {
        const float biases[2] = {bias_of(first + lane() / 4), bias_of(first + lane() / 4 + 8)};
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            unsigned parts[4];
            turn_to_parts(parts, residual[chunk], scratch);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = (chunk * 2 + i / 2) * 4 + i % 2 * 2;
                if (at >= Sums::kOwn * 4) break;
                parts[i] = pair<T>(own[at] + (biases[i % 2] + element_of<T>(parts[i], 0)),
                                   own[at + 1] + (biases[i % 2] + element_of<T>(parts[i], 1)));
            }
            store_chunk(parts, first, chunk, hooks);
        }
    }

    // Rounded where the product, silu and the product of both would have been, one after the other.
    __device__ static float gated(float gate, float up) {
        return rounded<T>(silu<T>(rounded<T>(gate))) * rounded<T>(up);
    }

    template <typename Hooks> __device__ void put_gated(const Own& own, int first, Hooks& hooks) const {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            unsigned parts[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = (chunk * 4 + i) * 4;
                if (at >= Sums::kOwn * 4) break;
                parts[i] = pair<T>(gated(own[at], own[at + 2]), gated(own[at + 1], own[at + 3]));
            }
            store_chunk(parts, first, chunk, hooks);
        }
    }

    // `is_last`: nobody adds up with this warp's room any more.
    template <typename Hooks> __device__ void consume(bool is_last, Hooks&& hooks) {
        for (int tile = begin; tile < end; tile += kUnits) {
            const int first = tile + threadIdx.x / 32 * kWarpUnits;
            Chunks residual;
            Accumulators sums;
            Own own;
            if (!kGated) fetch_residual(residual, first);
            hooks.begun(place(first, 0).feature, end);
            multiply(sums);
            exchange.add_up(own, sums, is_last && tile + kUnits >= end);
            hooks.added(own);
            if constexpr (kGated) put_gated(own, first, hooks);
            else put_plain(own, residual, first, hooks);
        }
    }
};

#endif
