// x @ weight^T for a few rows of x: the weights stream once from memory through a ring in shared memory.
//
// Each block owns an equal share of the weight's rows. A producer warp copies tiles of 16 rows x kPiece columns into
// the ring; the eight consumer warps split a tile's columns among them and multiply on the tensor cores, the weights
// as the left operand; sums of all tiles of a pass stay in registers until the last column, then the warps' sums are
// added in a fixed order. What a row gives never depends on the other rows. The kernel asks for its first weights
// before it waits for the kernel before it, and lets the next one do so when its own last tiles are under way.
#include "dependent.cuh"
#include "numbers.cuh"
#include "small_linear_parts.cuh"

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
// Rows in shared memory lie 16 bytes further apart than they are long: ldmatrix then meets no bank conflicts.
[[maybe_unused]] constexpr int kPadBytes = 16;
// One tile's sums of 8 rows of x, per warp: rows of 16 features, 4 words apart, again for the banks.
[[maybe_unused]] constexpr int kSumsPitch = 20;
[[maybe_unused]] constexpr int kSumsWords = 8 * kSumsPitch;

#if __CUDA_ARCH__ >= 900

// The weight's rows that one block computes, in passes of at most kMaxTiles tiles over all columns.
template <int kMaxTiles, int kUnits> struct Share {
    int begin, end, tiles, tiles_each, passes;

    __device__ explicit Share(int units) {
        begin = static_cast<int>(static_cast<long long>(units) * blockIdx.x / gridDim.x);
        end = static_cast<int>(static_cast<long long>(units) * (blockIdx.x + 1) / gridDim.x);
        tiles = (end - begin + kUnits - 1) / kUnits;
        passes = (tiles + kMaxTiles - 1) / kMaxTiles;
        tiles_each = passes ? (tiles + passes - 1) / passes : 0;
        passes = tiles_each ? (tiles + tiles_each - 1) / tiles_each : 0;
    }
    __device__ int tiles_in(int pass) const { return min(tiles_each, tiles - pass * tiles_each); }
    __device__ int first(int pass, int tile) const { return begin + (pass * tiles_each + tile) * kUnits; }
    __device__ int rows_at(int first) const { return min(kUnits, end - first); }
};

// Where a walk over (pass, piece of columns, tile) stands.
struct Position {
    int pass = 0, piece = 0, tile = 0, sequence = 0;

    template <typename Share> __device__ void advance(const Share& share, int pieces) {
        if (++tile < share.tiles_in(pass)) return;
        tile = 0;
        ++sequence;
        if (++piece < pieces) return;
        piece = 0;
        ++pass;
    }
};

// Barriers and stages of one ring; `full` ends when copies have come, `empty` when all consumers have read.
struct Ring {
    unsigned data, stride, full, empty;
    int stages, stage = 0;
    unsigned parity = 0;

    __device__ unsigned here() const { return data + stage * stride; }
    __device__ unsigned full_here() const { return full + 8 * stage; }
    __device__ unsigned empty_here() const { return empty + 8 * stage; }
    __device__ void advance() {
        if (++stage < stages) return;
        stage = 0;
        parity ^= 1;
    }
    __device__ void init() const {
        for (int i = 0; i < stages; ++i) {
            init_barrier(full + 8 * i, 1);
            init_barrier(empty + 8 * i, kConsumers);
        }
    }
};

template <typename T, int kPiece, int kMaxTiles, bool kGated> struct Producer {
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    const Share<kMaxTiles, kUnits>& share;
    const T* x;
    const T* weight;
    int rows, features, width, pieces;
    Ring weights, inputs;
    unsigned long long policy;

    __device__ unsigned bytes_of(int piece) const { return min(kPiece, width - piece * kPiece) * sizeof(T); }

    // The row of the weight that this lane copies, from column 0 of the piece on; nullptr: none.
    __device__ const T* source(const Position& at) const {
        const int lane = threadIdx.x % 32, unit = kGated ? lane % kUnits : lane;
        const int first = share.first(at.pass, at.tile);
        if (lane >= kTileRows || unit >= share.rows_at(first)) return nullptr;
        const long long row = first + unit + (kGated && lane >= kUnits ? features : 0);
        return weight + row * width + at.piece * kPiece;
    }

    __device__ void put_weights(const Position& at) {
        const unsigned bytes = bytes_of(at.piece);
        const int copied = share.rows_at(share.first(at.pass, at.tile)) * (kGated ? 2 : 1);
        if (threadIdx.x % 32 == 0) arrive_expecting(weights.full_here(), copied * bytes);
        __syncwarp();
        const int row = threadIdx.x % 32;
        const T* from = source(at);
        const unsigned to = weights.here() + row * (kPiece * sizeof(T) + kPadBytes);
        if (from) copy_once_read(to, from, bytes, weights.full_here(), policy);
        weights.advance();
    }

    __device__ void put_inputs(int sequence) {
        const int piece = sequence % pieces;
        const unsigned bytes = bytes_of(piece);
        if (sequence >= inputs.stages) wait_for_phase(inputs.empty_here(), inputs.parity ^ 1);
        if (threadIdx.x % 32 == 0) arrive_expecting(inputs.full_here(), rows * bytes);
        __syncwarp();
        for (int row = threadIdx.x % 32; row < rows; row += 32) {
            const unsigned to = inputs.here() + row * (kPiece * sizeof(T) + kPadBytes);
            copy(to, x + static_cast<long long>(row) * width + piece * kPiece, bytes, inputs.full_here());
        }
        inputs.advance();
    }

    __device__ void run(int num_prefetched, int lead TRACE_PARAMETER) {
        const int total = share.tiles * pieces, filled = min(weights.stages, total);
        Position at;
        int inputs_needed = 0;
        for (int i = 0; i < filled; ++i) {
            put_weights(at);
            inputs_needed = at.sequence + 1;
            at.advance(share, pieces);
        }
        Position ahead = at;
        for (int i = filled; i < min(total, filled + num_prefetched); ++i) {
            if (const T* from = source(ahead)) prefetch(from, bytes_of(ahead.piece));
            ahead.advance(share, pieces);
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
            at.advance(share, pieces);
            if (total - i - 1 == lead) let_next_begin();
        }
        TRACE(3);
    }
};

template <typename T, int kPiece, int kGroups, int kMaxTiles, bool kGated> struct Consumer {
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    static constexpr int kSteps = kPiece / 16 / kConsumers;
    static constexpr unsigned kPitch = kPiece * sizeof(T) + kPadBytes;
    static constexpr int kRounds = (kMaxTiles * kGroups + 1) / 2;
    const Share<kMaxTiles, kUnits>& share;
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
        __syncwarp();
        if (lane == 0) arrive(inputs.empty_here());
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
        __syncwarp();
        if (lane == 0) arrive(weights.empty_here());
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
            if (kGated || tile >= tiles || x_row >= rows || unit >= share.rows_at(first)) continue;
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
            if (tile < tiles && x_row < rows && unit < share.rows_at(first)) {
                float result = sum + extra[round];
                if constexpr (kGated) {
                    const float gate = rounded<T>(sum);
                    result = rounded<T>(gate / (1.0f + expf(-gate))) * rounded<T>(other);
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
    int num_stages, int num_input_stages, int num_prefetched, int lead TRACE_PARAMETER) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char shared[];
    TRACE(0);
    const Share<kMaxTiles, kGated ? kTileRows / 2 : kTileRows> share(features);
    const unsigned pitch = kPiece * sizeof(T) + kPadBytes, base = shared_address(shared);
    Ring weights{base, kTileRows * pitch}, inputs{base + num_stages * kTileRows * pitch, rows * pitch};
    weights.stages = num_stages, inputs.stages = num_input_stages;
    const unsigned parts = num_stages * kTileRows * pitch + num_input_stages * rows * pitch;
    weights.full = base + parts + 2 * kConsumers * kSumsWords * 4;
    weights.empty = weights.full + 8 * num_stages;
    inputs.full = weights.empty + 8 * num_stages;
    inputs.empty = inputs.full + 8 * num_input_stages;
    if (threadIdx.x == 0) {
        weights.init();
        inputs.init();
        publish_barriers();
    }
    __syncthreads();
    const int pieces = (width + kPiece - 1) / kPiece;
    if (threadIdx.x / 32 == kConsumers) {
        Producer<T, kPiece, kMaxTiles, kGated> producer{
            share, x, weight, rows, features, width, pieces, weights, inputs, read_once_policy()};
        producer.run(num_prefetched, lead TRACE_ARGUMENT);
    } else {
        wait_for_previous();
        Consumer<T, kPiece, kGroups, kMaxTiles, kGated> consumer{
            share, bias, residual, out, reinterpret_cast<float*>(shared + parts), rows, features, width, pieces,
            weights, inputs};
        consumer.run();
        if (threadIdx.x / 32 == 0) { TRACE(4); }
    }
#endif
}

}  // namespace

#define STREAM(NAME, T, KIND, GATED, PIECE, GROUPS, TILES, BLOCKS)                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) small_linear_##NAME##_##KIND##_##PIECE##_##GROUPS( \
        const T* x, const T* weight, const T* bias, const T* residual, T* out, int rows, int features, int width,    \
        int num_stages, int num_input_stages, int num_prefetched, int lead TRACE_PARAMETER) {                        \
        stream_linear<T, PIECE, GROUPS, TILES, GATED>(                                                               \
            x, weight, bias, residual, out, rows, features, width, num_stages, num_input_stages, num_prefetched,     \
            lead TRACE_ARGUMENT);                                                                                    \
    }
#define STREAMS(NAME, T, PIECE, GROUPS, TILES, BLOCKS)            \
    STREAM(NAME, T, plain, false, PIECE, GROUPS, TILES, BLOCKS)   \
    STREAM(NAME, T, gated, true, PIECE, GROUPS, TILES, BLOCKS)
#ifndef SMALL_LINEAR_TRIALS
STREAMS(float16, float16, 512, 1, 6, 2)
STREAMS(bfloat16, bfloat16, 512, 1, 6, 2)
STREAMS(float16, float16, 256, 2, 6, 2)
STREAMS(bfloat16, bfloat16, 256, 2, 6, 2)
#else
STREAMS(bfloat16, bfloat16, 256, 1, 6, 2)
STREAMS(bfloat16, bfloat16, 512, 1, 6, 2)
STREAMS(bfloat16, bfloat16, 1024, 1, 6, 2)
STREAMS(bfloat16, bfloat16, 256, 2, 6, 2)
STREAMS(bfloat16, bfloat16, 512, 2, 6, 2)
STREAMS(bfloat16, bfloat16, 256, 4, 4, 1)
STREAMS(bfloat16, bfloat16, 256, 8, 3, 1)
#endif
