// x @ weight^T for up to 128 rows of x on Hopper: the weights stream once from memory to the tensor cores.
//
// A tile is 64 rows of the weight for each warpgroup, the left operand of wgmma; the rows of x are its columns. Each cluster of two
// blocks has an equal range of rows of the weight, each block half of the columns; behind a tile's last column they
// add up through each other's shared memory (small_linear_tiles.cuh). In a block one warp asks for weights, 64 columns
// of a tile at a time, into a ring in shared memory, one for x into a ring of its own, and two or three warpgroups have
// 64 rows of the tile each. Which columns a block has depends on their number alone, so a row's result depends neither on the
// other rows nor on how many there are.
//
// A block takes nearly all shared memory, so the next kernel's takes its place the moment it ends, and fills its ring
// of weights before it waits for the slowest block of this kernel. Room is left for blocks of a small kernel in between.
#include "dependent.cuh"
#include "small_linear_tiles.cuh"

namespace {


struct Arguments {
    const TensorMap *weight_map, *rest_map, *x_map;  // of whole tiles, of what a range has beyond them
    const void *bias, *residual;
    void* out;
    int rows, features, range, steps;  // features of a cluster, steps of a block and tile
    int stage_bytes;                   // of weights
    int num_stages, num_x_stages, num_ahead;  // of weights and of x, of weights that are on their way at a time
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kColumns = 64;
constexpr int kRowBytes = 2 * kColumns;
constexpr int kGroupBytes = 64 * kRowBytes;  // a warpgroup's part of a stage of weights
constexpr int kScratchBytes = 512;  // of each consumer, to turn 32 x 8 elements

// Two elements, the first in the lower half.
template <typename T> __device__ __forceinline__ unsigned pair(float first, float second) {
    return from_float<T>(first).bits | static_cast<unsigned>(from_float<T>(second).bits) << 16;
}

template <typename T> __device__ __forceinline__ float element_of(unsigned pair, int which) {
    T element;
    element.bits = static_cast<unsigned short>(which ? pair >> 16 : pair);
    return to_float(element);
}

// Four 8x8 matrices change places: lane l has row l % 8 of matrix l / 8 in `rows`; in `parts`, of each matrix, elements
// 2 (l % 4) and the next of column l / 4. The warp has 512 bytes at `scratch`.
__device__ __forceinline__ void turn_to_rows(unsigned (&rows)[4], const unsigned (&parts)[4], unsigned scratch) {
    const unsigned at = scratch + threadIdx.x % 32 * 16;
    __syncwarp();
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(parts[0]),
                 "r"(parts[1]), "r"(parts[2]), "r"(parts[3]) : "memory");
    __syncwarp();
    load_shared_words(rows, at);
}

__device__ __forceinline__ void turn_to_parts(unsigned (&parts)[4], const unsigned (&rows)[4], unsigned scratch) {
    const unsigned at = scratch + threadIdx.x % 32 * 16;
    __syncwarp();
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(rows[0]), "r"(rows[1]), "r"(rows[2]),
                 "r"(rows[3]) : "memory");
    __syncwarp();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3]) : "r"(at) : "memory");
}

template <typename T, int kRows, int kGroups, bool kGated> struct Product {
    static constexpr int kConsumers = 4 * kGroups, kTileRows = 64 * kGroups;
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    using Sums = Exchange<kRows / 8>;
    // A warp has 16 rows of the tile: 16 features, or 8 and what they gate. It stores four matrices of 8 features x 8
    // rows of x at a time.
    static constexpr int kWarpUnits = kUnits / kConsumers;
    static constexpr int kChunkGroups = kGated ? 4 : 2;
    static constexpr int kChunks = (Sums::kOwn + kChunkGroups - 1) / kChunkGroups;

    const Arguments& arguments;
    const int rank, begin, end;  // the cluster's features
    Ring weights, inputs;
    Sums exchange;
    unsigned scratch;

    __device__ int column(int step) const { return (rank * arguments.steps + step) * kColumns; }

    // --- the two producers, a lane each ---

    // Only so many copies of weights are on their way at a time: the copy engine takes one after the other, and x, which
    // is asked for last, stands behind all of them.
    __device__ void produce_weights() {
        const unsigned long long policy = read_once_policy();
        Ring arriving = weights;
        int num_asked_for = 0;
        for (int first = begin; first < end; first += kUnits) {
            const int units = min(kUnits, begin + arguments.range - first);
            const TensorMap* map = units == kUnits ? arguments.weight_map : arguments.rest_map;
#pragma unroll 1
            for (int step = 0; step < arguments.steps; ++step) {
                if (num_asked_for == arguments.num_ahead) {
                    wait_for_phase(arriving.full_here(), arriving.parity);
                    arriving.advance();
                } else {
                    ++num_asked_for;
                }
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
            for (int step = 0; step < arguments.steps; ++step) {
                wait_for_phase(inputs.empty_here(), inputs.parity ^ 1);
                arrive_expecting(inputs.full_here(), inputs.stride);
                copy_box(inputs.here(), arguments.x_map, column(step), 0, inputs.full_here(), policy);
                inputs.advance();
            }
        }
    }

    // --- the consumers ---

    float sums[kRows / 2];
    float own[Sums::kOwn * 4];

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
    __device__ void multiply() {
        const unsigned part = group() * kGroupBytes;
        unsigned weights_before = 0, inputs_before = 0;
#pragma unroll 1
        for (int i = 0; i < arguments.steps; ++i) {
            wait_for_phase(inputs.full_here(), inputs.parity);
            wait_for_phase(weights.full_here(), weights.parity);
            const unsigned long long a = descriptor(weights.here() + part), b = descriptor(inputs.here());
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
        const int row = (number * kSplits + rank) * 8 + lane() % 8, feature = first + (kGated ? 0 : matrix % 2 * 8);
        return {row, feature, number < Sums::kOwn && row < arguments.rows && feature < end};
    }
    __device__ long long offset(const Place& at) const {
        return static_cast<long long>(at.row) * arguments.features + at.feature;
    }

    using Chunks = unsigned[kChunks][4];

    __device__ void fetch_residual(Chunks& to, int first) const {
        const T* residual = static_cast<const T*>(arguments.residual);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const Place at = place(first, chunk);
            if (residual && at.exists) load_words(to[chunk], residual + offset(at));
            else to[chunk][0] = to[chunk][1] = to[chunk][2] = to[chunk][3] = 0;
        }
    }

    __device__ void store_chunk(const unsigned (&parts)[4], int first, int chunk) const {
        const Place at = place(first, chunk);
        unsigned row[4];
        turn_to_rows(row, parts, scratch);
        if (!at.exists) return;
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(static_cast<T*>(arguments.out) + offset(at)),
                     "r"(row[0]), "r"(row[1]), "r"(row[2]), "r"(row[3]) : "memory");
    }

    __device__ float bias_of(int feature) const {
        const T* bias = static_cast<const T*>(arguments.bias);
        return bias && feature < end ? to_float(bias[feature]) : 0.0f;
    }

    __device__ void put_plain(const Chunks& residual, int first) const {
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
            store_chunk(parts, first, chunk);
        }
    }

    // Rounded where the product, silu and the product of both would have been, one after the other.
    __device__ static float gated(float gate, float up) {
        return rounded<T>(silu<T>(rounded<T>(gate))) * rounded<T>(up);
    }

    __device__ void put_gated(int first) const {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            unsigned parts[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = (chunk * 4 + i) * 4;
                if (at >= Sums::kOwn * 4) break;
                parts[i] = pair<T>(gated(own[at], own[at + 2]), gated(own[at + 1], own[at + 3]));
            }
            store_chunk(parts, first, chunk);
        }
    }

    // A warpgroup whose 64 rows of the tile are beyond the range: products of what is there would cost power that the
    // others' clock needs.
    __device__ void pass_over() {
#pragma unroll 1
        for (int i = 0; i < arguments.steps; ++i) {
            wait_for_phase(inputs.full_here(), inputs.parity);
            wait_for_phase(weights.full_here(), weights.parity);
            give_back(weights.empty_here(), inputs.empty_here());
            weights.advance();
            inputs.advance();
        }
    }

    __device__ void consume() {
        const int part = group() * (kUnits / kGroups);
        for (int tile = begin; tile < end; tile += kUnits) {
            if (tile + part >= end) {
                pass_over();
                continue;
            }
            const int first = tile + threadIdx.x / 32 * kWarpUnits;
            Chunks residual;
            if (!kGated) fetch_residual(residual, first);
            multiply();
            exchange.add_up(own, sums, tile + part + kUnits >= end);
            if constexpr (kGated) put_gated(first);
            else put_plain(residual, first);
        }
    }
};

// Shared memory: stages of x, then of weights, sums of other blocks, the consumers' scratch, barriers. So what a
// product reads beyond the rows that a copy has brought is shared memory, too; what becomes of it is not stored.
template <typename T, int kRows, int kGroups, bool kGated>
__device__ __forceinline__ void run(const Arguments& arguments) {
    extern __shared__ __align__(1024) unsigned char shared[];
    using Work = Product<T, kRows, kGroups, kGated>;
    using Sums = typename Work::Sums;
    constexpr int kConsumers = Work::kConsumers;
    let_next_begin();
    const int warp = threadIdx.x / 32, num_groups = (arguments.rows + 7) / 8;
    const unsigned base = (shared_address(shared) + 1023) / 1024 * 1024, x_bytes = num_groups * 8 * kRowBytes;
    const unsigned tiles = base + arguments.num_x_stages * x_bytes, sums = tiles + arguments.num_stages * arguments.stage_bytes;
    const unsigned scratch = sums + kConsumers * Sums::kBytes, full = scratch + kConsumers * kScratchBytes;
    const unsigned empty = full + 8 * arguments.num_stages, x_full = empty + 8 * arguments.num_stages;
    const unsigned x_empty = x_full + 8 * arguments.num_x_stages, sums_full = x_empty + 8 * arguments.num_x_stages;
    const unsigned sums_empty = sums_full + 8 * kConsumers;
    const Ring weights{tiles, static_cast<unsigned>(arguments.stage_bytes), full, empty, arguments.num_stages, 0, 0};
    const Ring inputs{base, x_bytes, x_full, x_empty, arguments.num_x_stages, 0, 0};
    if (warp == kConsumers && elect()) {
        bring_near(arguments.weight_map);
        bring_near(arguments.rest_map);
        bring_near(arguments.x_map);
        weights.init(kConsumers);
        inputs.init(kConsumers);
        for (int i = 0; i < kConsumers; ++i) {
            init_barrier(sums_full + 8 * i, 1);
            init_barrier(sums_empty + 8 * i, kSplits - 1);
        }
        publish_barriers();
    }
    __syncthreads();
    arrive_at_cluster();
    const int rank = cluster_rank(), begin = static_cast<int>(blockIdx.x) / kSplits * arguments.range;
    Work work{arguments, rank, begin, min(begin + arguments.range, arguments.features), weights, inputs,
              Sums{sums + warp * Sums::kBytes, sums_full + 8 * warp, sums_empty + 8 * warp, rank, num_groups, 0},
              scratch + warp * kScratchBytes};
    if (warp < kConsumers) {
        wait_for_cluster();
        wait_for_previous();
        work.consume();
        return;
    }
    if (warp == kConsumers) {
        if (elect()) work.produce_weights();
    } else {
        wait_for_previous();
        if (elect()) work.produce_inputs();
    }
    __syncwarp();
    wait_for_cluster();
}

#endif

}  // namespace

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RUN(T, ROWS, GROUPS, GATED)                                                                                \
    run<T, ROWS, GROUPS, GATED>({&weight_map, &rest_map, &x_map, bias, residual, out, rows, features, range, steps, \
                                 stage_bytes, num_stages, num_x_stages, num_ahead})
#else
#define RUN(T, ROWS, GROUPS, GATED) __trap()
#endif
#define KERNEL(NAME, T, KIND, GATED, ROWS, GROUPS)                                                                 \
    extern "C" __global__ void __launch_bounds__(32 * (4 * GROUPS + 2), 1)                                         \
    small_linear_tiles_##NAME##_##KIND##_##ROWS##_##GROUPS(                                                        \
        const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap rest_map,                  \
        const __grid_constant__ TensorMap x_map, const void* bias, const void* residual, void* out, int rows,      \
        int features, int range, int steps, int stage_bytes, int num_stages, int num_x_stages, int num_ahead) {    \
        RUN(T, ROWS, GROUPS, GATED);                                                                               \
    }
#define FEW_ROWS(NAME, T, ROWS)            \
    KERNEL(NAME, T, plain, false, ROWS, 2) \
    KERNEL(NAME, T, gated, true, ROWS, 2)
#define MANY_ROWS(NAME, T, ROWS)           \
    KERNEL(NAME, T, plain, false, ROWS, 2) \
    KERNEL(NAME, T, plain, false, ROWS, 3) \
    KERNEL(NAME, T, gated, true, ROWS, 3)
#define KERNELS(NAME, T)   \
    FEW_ROWS(NAME, T, 16)  \
    FEW_ROWS(NAME, T, 32)  \
    FEW_ROWS(NAME, T, 64)  \
    MANY_ROWS(NAME, T, 96) \
    MANY_ROWS(NAME, T, 128)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
