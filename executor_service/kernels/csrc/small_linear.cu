// x @ weight^T for a few rows of x: the weights stream once from memory through a ring in shared memory.
//
// Each block owns an equal share of the weight's rows. A producer warp copies tiles of 16 rows x kPiece columns into
// the ring; the eight consumer warps split a tile's columns among them and multiply on the tensor cores, the weights
// as the left operand; sums of all tiles of a pass stay in registers until the last column, then the warps' sums are
// added in a fixed order. What a row gives never depends on the other rows. The kernel asks for its first weights
// before it waits for the kernel before it, and lets the next one do so when its own last tiles are under way.
#include "dependent.cuh"
#include "numbers.cuh"
#include "small_linear_ring.cuh"

#ifndef SMALL_LINEAR_TRACE
#define TRACE_PARAMETER
#define TRACE_ARGUMENT
#define TRACE(SLOT)
#else
#define TRACE_PARAMETER , long long* trace
#define TRACE_ARGUMENT , trace
__device__ __forceinline__ long long now() {
    long long t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}
#define TRACE(SLOT) if (threadIdx.x % 32 == 0) trace[blockIdx.x * 8 + SLOT] = now()
#endif

namespace {

constexpr int kConsumers = 8;
[[maybe_unused]] constexpr int kTileRows = 16;
constexpr int kThreads = 32 * (kConsumers + 1);
// One tile's sums of 8 rows of x, per warp: rows of 16 features, 4 words apart, again for the banks.
[[maybe_unused]] constexpr int kSumsPitch = 20;
[[maybe_unused]] constexpr int kSumsWords = 8 * kSumsPitch;

#if __CUDA_ARCH__ >= 900

template <typename T, int kPiece, bool kGated> struct Producer {
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    static constexpr unsigned kPitch = kPiece * sizeof(T) + kPadBytes;
    const Matrix& matrix;
    const T* x;
    int rows;
    Ring weights, inputs;
    unsigned long long policy;

    // The whole warp computes the same addresses and one lane copies: a loop over lanes would take longer than the data.
    __device__ void put_weights(const Position& at) {
        const unsigned bytes = matrix.bytes_of(at.piece), to = weights.here(), barrier = weights.full_here();
        const int count = matrix.share.units_at(matrix.share.first(at.pass, at.tile));
        const unsigned char* from = matrix.source(at);
        const unsigned char* other = from + matrix.features * matrix.row_bytes();
        if (elect()) {
            arrive_expecting(barrier, count * (kGated ? 2 : 1) * bytes);
#pragma unroll
            for (int row = 0; row < kUnits; ++row) {
                if (row >= count) break;
                copy_once_read(to + row * kPitch, from + row * matrix.row_bytes(), bytes, barrier, policy);
                if constexpr (kGated) {
                    const unsigned there = to + (kUnits + row) * kPitch;
                    copy_once_read(there, other + row * matrix.row_bytes(), bytes, barrier, policy);
                }
            }
        }
        weights.advance();
    }

    __device__ void put_inputs(int sequence) {
        const int piece = sequence % matrix.pieces;
        const unsigned bytes = matrix.bytes_of(piece), to = inputs.here(), barrier = inputs.full_here();
        if (sequence >= inputs.stages) wait_for_phase(inputs.empty_here(), inputs.parity ^ 1);
        const T* from = x + piece * kPiece;
        if (elect()) {
            arrive_expecting(barrier, rows * bytes);
#pragma unroll 8
            for (int row = 0; row < rows; ++row)
                copy(to + row * kPitch, from + static_cast<long long>(row) * matrix.width, bytes, barrier);
        }
        inputs.advance();
    }

    __device__ void run(const Matrix& next, int skipped, int distance, int lead TRACE_PARAMETER) {
        const Share& share = matrix.share;
        const int total = share.tiles * matrix.pieces, filled = min(weights.stages, total);
        Position at;
        int inputs_needed = 0;
        for (int i = 0; i < filled; ++i) {
            put_weights(at);
            inputs_needed = at.sequence + 1;
            at.advance(share, matrix.pieces);
        }
        TRACE(1);
        if (total - filled <= lead) let_next_begin();
        wait_for_previous();
        TRACE(2);
        int inputs_put = 0;
        while (inputs_put < inputs_needed) put_inputs(inputs_put++);
        for (int i = filled; i < total; ++i) {
            if (at.sequence == inputs_put) put_inputs(inputs_put++);
            wait_for_phase(weights.empty_here(), weights.parity ^ 1);
            put_weights(at);
            at.advance(share, matrix.pieces);
            if (total - i - 1 == lead) let_next_begin();
        }
        if (next.weight) prefetch_tiles(next, skipped, distance);
        TRACE(3);
    }
};

template <typename T, int kPiece, int kGroups, int kMaxTiles, bool kGated> struct Consumer {
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    static constexpr int kSteps = kPiece / 16 / kConsumers;
    static constexpr unsigned kPitch = kPiece * sizeof(T) + kPadBytes;
    static constexpr int kRounds = (kMaxTiles * kGroups + 1) / 2;
    const Share& share;
    const T *bias, *residual;
    T* out;
    float* parts;
    int rows, features, width, pieces;
    Ring weights, inputs;
    float sums[kMaxTiles][kGroups][4];
    unsigned right[kSteps][kGroups][2];

    // Bytes from a row's begin to this warp's 16 columns of a step. Of every 256 columns each warp has 32, of a rest of
    // 128 it has 16, whatever kPiece is: so all variants add in the same order.
    template <bool kWhole> __device__ unsigned columns(int step, int steps) const {
        const unsigned warp = threadIdx.x / 32;
        const bool is_rest = !kWhole && step % 2 == 0 && step + 1 == steps;
        return step / 2 * 2 * kConsumers * 32 + (is_rest ? warp * 32 : warp * 64 + step % 2 * 32);
    }

    template <bool kWhole> __device__ void load_inputs(int steps) {
        const int lane = threadIdx.x % 32;
        wait_for_phase(inputs.full_here(), inputs.parity);
        const unsigned first = inputs.here() + (lane / 8 % 2) * 16;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            // Rows that are not there repeat the last: what they give is not stored.
            const unsigned from = first + min(group * 8 + lane % 8, rows - 1) * kPitch;
#pragma unroll
            for (int i = 0; i < kSteps; ++i)
                if (kWhole || i < steps) load_matrices(right[i][group], from + columns<kWhole>(i, steps));
        }
        release(inputs.empty_here());
        inputs.advance();
    }

    template <bool kWhole> __device__ void add_tile(float (&to)[kGroups][4], int steps) {
        const int lane = threadIdx.x % 32;
        wait_for_phase(weights.full_here(), weights.parity);
        const unsigned from = weights.here() + (lane % 16) * kPitch + (lane / 16) * 16;
        unsigned left[kSteps][4];
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            if (kWhole || i < steps) load_matrices(left[i], from + columns<kWhole>(i, steps));
        release(weights.empty_here());
        weights.advance();
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
            if (kWhole || i < steps) {
#pragma unroll
                for (int group = 0; group < kGroups; ++group) multiply_add<T>(to[group], left[i], right[i][group]);
            }
    }

    template <bool kWhole> __device__ void add_piece(int tiles, int steps) {
        load_inputs<kWhole>(steps);
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; ++tile)
            if (tile < tiles) add_tile<kWhole>(sums[tile], steps);
    }

    // Two (tile, group) at a time: every thread adds the warps' sums of one output, warp 0's first.
    __device__ void finish(int pass, int tiles) {
        const int half = threadIdx.x / 128, row = threadIdx.x % 128 / 16, unit = threadIdx.x % 16;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        float extra[kRounds];
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const int tile = (2 * round + half) / kGroups, x_row = (2 * round + half) % kGroups * 8 + row;
            const int first = share.first(pass, tile), feature = first + unit;
            extra[round] = 0.0f;
            if (kGated || tile >= tiles || x_row >= rows || unit >= share.units_at(first)) continue;
            if (bias) extra[round] = to_float(bias[feature]);
            if (residual) extra[round] += to_float(residual[static_cast<long long>(x_row) * features + feature]);
        }
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            if (2 * round / kGroups >= tiles) break;
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                if (2 * round + which >= kMaxTiles * kGroups) continue;
                const float(&from)[4] = sums[(2 * round + which) / kGroups][(2 * round + which) % kGroups];
                float* to = parts + (warp * 2 + which) * kSumsWords + lane % 4 * 2 * kSumsPitch + lane / 4;
                to[0] = from[0], to[kSumsPitch] = from[1], to[8] = from[2], to[kSumsPitch + 8] = from[3];
            }
            asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory");
            const float* column = parts + half * kSumsWords + row * kSumsPitch + unit;
            float sum = 0.0f, other = 0.0f;
#pragma unroll
            for (int w = 0; w < kConsumers; ++w) {
                sum += column[w * 2 * kSumsWords];
                if (kGated && unit < kUnits) other += column[w * 2 * kSumsWords + kUnits];
            }
            const int tile = (2 * round + half) / kGroups, x_row = (2 * round + half) % kGroups * 8 + row;
            const int first = share.first(pass, tile);
            if (tile < tiles && x_row < rows && unit < share.units_at(first)) {
                float result = sum + extra[round];
                if constexpr (kGated) {
                    const float gate = rounded<T>(sum);
                    result = rounded<T>(silu<T>(gate)) * rounded<T>(other);
                }
                out[static_cast<long long>(x_row) * features + first + unit] = from_float<T>(result);
            }
            asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory");
        }
    }

    __device__ void run() {
        for (int pass = 0; pass < share.passes; ++pass) {
            const int tiles = share.tiles_in(pass);
#pragma unroll
            for (int tile = 0; tile < kMaxTiles; ++tile)
#pragma unroll
                for (int group = 0; group < kGroups; ++group)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[tile][group][e] = 0.0f;
            for (int piece = 0; piece < width / kPiece; ++piece) add_piece<true>(tiles, kSteps);
            if (const int rest = width % kPiece) add_piece<false>(tiles, rest / 16 / kConsumers);
            finish(pass, tiles);
        }
    }
};

#endif

template <typename T, int kPiece, int kGroups, int kMaxTiles, bool kGated>
__device__ __forceinline__ void stream_linear(
    const T* x, const T* weight, const T* bias, const T* residual, T* out, int rows, int features, int width,
    int num_stages, int num_input_stages, int lead, int distance, const void* next, int next_features, int next_width,
    int next_is_gated, int next_piece, int next_max_tiles, int next_stages TRACE_PARAMETER) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char shared[];
    TRACE(0);
    const Matrix matrix(weight, features, width, kGated, kTileRows, kMaxTiles, kPiece);
    const unsigned pitch = kPiece * sizeof(T) + kPadBytes, base = shared_address(shared);
    Ring weights{base, kTileRows * pitch}, inputs{base + num_stages * kTileRows * pitch, rows * pitch};
    weights.stages = num_stages, inputs.stages = num_input_stages;
    const unsigned parts = num_stages * kTileRows * pitch + num_input_stages * rows * pitch;
    weights.full = base + parts + 2 * kConsumers * kSumsWords * 4;
    weights.empty = weights.full + 8 * num_stages;
    inputs.full = weights.empty + 8 * num_stages;
    inputs.empty = inputs.full + 8 * num_input_stages;
    if (threadIdx.x == 0) {
        weights.init(kConsumers);
        inputs.init(kConsumers);
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x / 32 == kConsumers) {
        const Matrix after(next, next_features, next_width, next_is_gated, kTileRows, next_max_tiles, next_piece);
        Producer<T, kPiece, kGated> producer{matrix, x, rows, weights, inputs, read_once_policy()};
        producer.run(after, next_stages, distance, lead TRACE_ARGUMENT);
    } else {
        wait_for_previous();
        Consumer<T, kPiece, kGroups, kMaxTiles, kGated> consumer{
            matrix.share, bias, residual, out, reinterpret_cast<float*>(shared + parts), rows, features, width,
            matrix.pieces, weights, inputs};
        consumer.run();
        if (threadIdx.x / 32 == 0) { TRACE(4); }
#ifdef SMALL_LINEAR_TRACE
        unsigned sm;
        asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
        if (threadIdx.x == 0) trace[blockIdx.x * 8 + 5] = sm;
#endif
    }
#endif
}

}  // namespace

#define STREAM(NAME, T, KIND, GATED, PIECE, GROUPS, TILES, BLOCKS)                                                    \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) small_linear_##NAME##_##KIND##_##PIECE##_##GROUPS( \
        const T* x, const T* weight, const T* bias, const T* residual, T* out, int rows, int features, int width,     \
        int num_stages, int num_input_stages, int lead, int distance, const void* next, int next_features,            \
        int next_width, int next_is_gated, int next_piece, int next_max_tiles, int next_stages TRACE_PARAMETER) {     \
        stream_linear<T, PIECE, GROUPS, TILES, GATED>(                                                                \
            x, weight, bias, residual, out, rows, features, width, num_stages, num_input_stages, lead, distance,      \
            next, next_features, next_width, next_is_gated, next_piece, next_max_tiles, next_stages TRACE_ARGUMENT);  \
    }
#define STREAMS(NAME, T, PIECE, GROUPS, TILES, BLOCKS)            \
    STREAM(NAME, T, plain, false, PIECE, GROUPS, TILES, BLOCKS)   \
    STREAM(NAME, T, gated, true, PIECE, GROUPS, TILES, BLOCKS)
#ifndef SMALL_LINEAR_TRIALS
STREAMS(float16, float16, 1024, 1, 6, 1)
STREAMS(bfloat16, bfloat16, 1024, 1, 6, 1)
STREAMS(float16, float16, 1024, 2, 6, 1)
STREAMS(bfloat16, bfloat16, 1024, 2, 6, 1)
#else
STREAMS(bfloat16, bfloat16, 512, 1, 6, 2)
STREAMS(bfloat16, bfloat16, 1024, 1, 6, 2)
STREAMS(bfloat16, bfloat16, 512, 2, 6, 1)
STREAMS(bfloat16, bfloat16, 1024, 2, 6, 1)
#endif
