// x @ weight^T for 17 to 128 rows of x on Hopper: the weights stream once from memory to the tensor cores.
//
// A tile is 128 rows of the weight, the left operand of wgmma; the rows of x are its columns. One warp asks for weights,
// 64 columns of a tile at a time, into a ring in shared memory, one for x into a ring of its own, and two warpgroups have
// 64 rows of the tile each. All steps of all tiles are cut into equal ranges, one per multiprocessor; a tile that lies in
// several is added up in the order of its columns (small_linear_tiles.cuh). Clusters of blocks have tiles side by side
// and fetch each a part of x for all. Which steps a block has depends on the weight alone, so a row's result depends
// neither on the other rows nor on how many there are.
//
// A block takes nearly all shared memory, so the next kernel's takes its place the moment it ends, and fills its ring of
// weights before it waits for the slowest block of this kernel.
#include "dependent.cuh"
#include "small_linear_tiles.cuh"

namespace {

constexpr int kConsumers = 8;
constexpr int kThreads = 32 * (kConsumers + 2);

struct Arguments {
    const TensorMap *weight_map, *x_map;
    const void *bias, *residual;
    void* out;
    float* sums;
    int* flags;
    int rows, features, steps, cluster, num_stages, num_x_stages, burst;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kTileRows = 128;
constexpr int kColumns = 64;
constexpr int kRowBytes = 2 * kColumns;
constexpr int kTileBytes = kTileRows * kRowBytes;
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

template <typename T, int kRows, bool kGated> struct Product {
    static constexpr int kCount = kRows / 2;  // sums of a thread
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    // A warp has 16 rows of the tile: 16 features, or 8 and what they gate. It stores four matrices of 8 features x 8 rows
    // of x at a time.
    static constexpr int kWarpUnits = kUnits / kConsumers;
    static constexpr int kChunkRows = kGated ? 32 : 16;
    static constexpr int kChunks = (kRows + kChunkRows - 1) / kChunkRows;

    const Arguments& arguments;
    const Share share;
    const unsigned rank;
    Ring weights, inputs;
    unsigned scratch;

    __device__ int first_unit(int step) const {
        return (step / share.steps * arguments.cluster + static_cast<int>(rank)) * kUnits;
    }
    __device__ int column(int step) const { return step % share.steps * kColumns; }

    // --- the two producers, a lane each ---

    __device__ void produce_weights() {
        const unsigned long long policy = read_once_policy();
        Ring free = weights;
        for (int step = share.begin; step < share.end;) {
            const int count = min(arguments.burst, share.end - step);
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                wait_for_phase(free.empty_here(), free.parity ^ 1);
                free.advance();
            }
#pragma unroll 1
            for (int i = 0; i < count; ++i, ++step) {
                const unsigned to = weights.here(), barrier = weights.full_here();
                arrive_expecting(barrier, kTileBytes);
                if constexpr (kGated) {
                    copy_groups(to, arguments.weight_map, column(step), first_unit(step) / 8, barrier, policy);
                } else {
                    copy_box(to, arguments.weight_map, column(step), first_unit(step), barrier, policy);
                }
                weights.advance();
            }
        }
    }

    __device__ void produce_inputs() {
        const unsigned long long policy = keep_policy();
        const int box_rows = static_cast<int>(inputs.stride) / kRowBytes / arguments.cluster;
        const unsigned blocks = (1u << arguments.cluster) - 1;
#pragma unroll 1
        for (int step = share.begin; step < share.end; ++step) {
            wait_for_phase(inputs.empty_here(), inputs.parity ^ 1);
            const int first = static_cast<int>(rank) * box_rows;
            const unsigned to = inputs.here() + first * kRowBytes, barrier = inputs.full_here();
            arrive_expecting(barrier, inputs.stride);
            if (arguments.cluster == 1) {
                copy_box(to, arguments.x_map, column(step), first, barrier, policy);
            } else {
                copy_box_to_all(to, arguments.x_map, column(step), first, barrier, blocks, policy);
            }
            inputs.advance();
        }
    }

    // --- the consumers ---

    float sums[kCount];

    __device__ static int lane() { return threadIdx.x % 32; }
    // The same for all lanes, which the compiler cannot know: products want their operands' places in uniform registers.
    __device__ static int group() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0); }

    __device__ void multiply(int count) {
        const unsigned half = group() * (kTileBytes / 2);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            wait_for_phase(inputs.full_here(), inputs.parity);
            wait_for_phase(weights.full_here(), weights.parity);
            const unsigned long long a = descriptor(weights.here() + half), b = descriptor(inputs.here());
            begin_products();
#pragma unroll
            for (int k = 0; k < kColumns / 16; ++k) multiply_shared(T(), sums, a + 2 * k, b + 2 * k, i > 0 || k > 0);
            commit_products();
            wait_for_products();
            if (lane() == 0) arrive(weights.empty_here());
            if (lane() < arguments.cluster) arrive_at_rank(inputs.empty_here(), lane());
            weights.advance();
            inputs.advance();
        }
        settle(sums);
    }

    // What a lane has of a chunk, eight features of one row of x.
    struct Place {
        int row, feature;
        bool exists;
    };
    __device__ Place place(int first, int chunk) const {
        const int matrix = lane() / 8, block = kGated ? matrix : matrix / 2, half = kGated ? 0 : matrix % 2;
        const int row = chunk * kChunkRows + block * 8 + lane() % 8, feature = first + half * 8;
        return {row, feature, row < arguments.rows && feature < arguments.features};
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
        return bias && feature < arguments.features ? to_float(bias[feature]) : 0.0f;
    }

    __device__ void put_plain(const Chunks& residual, int first) const {
        const float biases[2] = {bias_of(first + lane() / 4), bias_of(first + lane() / 4 + 8)};
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            if (chunk * kChunkRows >= arguments.rows) break;
            unsigned parts[4];
            turn_to_parts(parts, residual[chunk], scratch);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* from = sums + (chunk * 2 + i / 2) * 4 + i % 2 * 2;
                parts[i] = pair<T>(from[0] + (biases[i % 2] + element_of<T>(parts[i], 0)),
                                   from[1] + (biases[i % 2] + element_of<T>(parts[i], 1)));
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
            if (chunk * kChunkRows >= arguments.rows) break;
            unsigned parts[4] = {};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if ((chunk * 4 + i) * 4 >= kCount) break;
                const float* from = sums + (chunk * 4 + i) * 4;
                parts[i] = pair<T>(gated(from[0], from[2]), gated(from[1], from[3]));
            }
            store_chunk(parts, first, chunk);
        }
    }

    // The tile's other steps are with the ranges up to the one that has its last.
    __device__ void add_others(const Leftovers<kCount, 32 * kConsumers>& leftovers, int tile_end) {
        const int count = share.last_of(tile_end) - share.index, cluster = arguments.cluster;
        if (count) leftovers.add(sums, static_cast<int>(blockIdx.x) - cluster, -cluster, count);
    }

    __device__ void consume() {
        const Leftovers<kCount, 32 * kConsumers> leftovers{arguments.sums, arguments.flags, (arguments.rows + 7) / 8};
        for (int step = share.begin; step < share.end;) {
            const int tile_begin = step - step % share.steps, tile_end = tile_begin + share.steps;
            const int end = min(share.end, tile_end), first = first_unit(step) + threadIdx.x / 32 * kWarpUnits;
            const bool is_owner = step == tile_begin;
            Chunks residual;
            if (!kGated && is_owner) fetch_residual(residual, first);
            multiply(end - step);
            if (!is_owner) {
                leftovers.leave(sums, blockIdx.x);
            } else {
                if (end < tile_end) add_others(leftovers, tile_end);
                if constexpr (kGated) put_gated(first);
                else put_plain(residual, first);
            }
            step = end;
        }
    }
};

// Shared memory: stages of x, then of weights, the consumers' scratch, barriers. So what a product reads beyond the rows
// of x that are there is shared memory, too; what becomes of it is not stored.
template <typename T, int kRows, bool kGated> __device__ __forceinline__ void run(const Arguments& arguments) {
    extern __shared__ __align__(1024) unsigned char shared[];
    using Work = Product<T, kRows, kGated>;
    let_next_begin();
    const int warp = threadIdx.x / 32, cluster = arguments.cluster;
    const unsigned start = shared_address(shared), base = (start + 1023) / 1024 * 1024;
    const unsigned x_bytes = (arguments.rows + 8 * cluster - 1) / (8 * cluster) * (8 * cluster) * kRowBytes;
    const unsigned tiles = base + arguments.num_x_stages * x_bytes, scratch = tiles + arguments.num_stages * kTileBytes;
    const unsigned full = scratch + kConsumers * kScratchBytes, empty = full + 8 * arguments.num_stages;
    const unsigned x_full = empty + 8 * arguments.num_stages, x_empty = x_full + 8 * arguments.num_x_stages;
    const Ring weights{tiles, kTileBytes, full, empty, arguments.num_stages, 0, 0};
    const Ring inputs{base, x_bytes, x_full, x_empty, arguments.num_x_stages, 0, 0};
    if (warp == kConsumers && elect()) {
        bring_near(arguments.weight_map);
        bring_near(arguments.x_map);
        weights.init(kConsumers);
        inputs.init(kConsumers * cluster);
        publish_barriers();
    }
    __syncthreads();
    if (cluster > 1) arrive_at_cluster();
    const int units = Work::kUnits * cluster;
    Work work{arguments, Share((arguments.features + units - 1) / units, arguments.steps, cluster), cluster_rank(),
              weights, inputs, scratch + warp * kScratchBytes};
    if (warp == kConsumers) {
        if (elect()) work.produce_weights();
        __syncwarp();
    }
    if (cluster > 1) wait_for_cluster();
    if (warp < kConsumers) {
        wait_for_previous();
        work.consume();
    } else if (warp == kConsumers + 1) {
        wait_for_previous();
        if (elect()) work.produce_inputs();
    }
    if (cluster > 1) {  // nobody leaves while others may still write here
        __syncwarp();
        arrive_at_cluster();
        wait_for_cluster();
    }
}

#endif

}  // namespace

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RUN(T, ROWS, GATED)                                                                                           \
    run<T, ROWS, GATED>({&weight_map, &x_map, bias, residual, out, sums, flags, rows, features, steps, cluster, num_stages, \
                         num_x_stages, burst})
#else
#define RUN(T, ROWS, GATED) __trap()
#endif
#define KERNEL(NAME, T, KIND, GATED, ROWS)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) small_linear_tiles_##NAME##_##KIND##_##ROWS(         \
        const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map, const void* bias,   \
        const void* residual, void* out, float* sums, int* flags, int rows, int features, int steps, int cluster,  \
        int num_stages, int num_x_stages, int burst) {                                                             \
        RUN(T, ROWS, GATED);                                                                                       \
    }
#define KINDS(NAME, T, ROWS)            \
    KERNEL(NAME, T, plain, false, ROWS) \
    KERNEL(NAME, T, gated, true, ROWS)
#define KERNELS(NAME, T)   \
    KINDS(NAME, T, 16)     \
    KINDS(NAME, T, 32)     \
    KINDS(NAME, T, 64)     \
    KINDS(NAME, T, 96)     \
    KINDS(NAME, T, 128)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
