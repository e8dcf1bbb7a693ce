// x @ weight^T for a few rows of x: the weights stream once from memory through a ring in shared memory.
//
// Each block owns an equal share of the weight's rows, to the row. A producer warp copies tiles of 16 rows x kPiece
// columns into the ring; eight consumer warps split a tile's columns among them and multiply on the tensor cores, the
// weights as the left operand. x goes from memory into registers, once per pass. Sums of all tiles of a pass stay in
// registers until the last column; then the warps' sums are added in a fixed order. Which columns a warp takes, and in
// which order, depends on the number of columns alone: a row's result depends neither on the other rows nor on how many.
//
// A block takes nearly all shared memory, so the next kernel's takes its place the moment it ends, and fills its ring
// before it waits for the slowest block of this kernel.
#include "dependent.cuh"
#include "numbers.cuh"
#include "small_linear_parts.cuh"

namespace {

constexpr int kConsumers = 8;
constexpr int kThreads = 32 * (kConsumers + 1);
[[maybe_unused]] constexpr int kTileRows = 16;
// In shared memory rows lie 64 bytes further apart than they are long: eight lanes that read 16 bytes each, of two
// rows, then meet no bank conflict.
[[maybe_unused]] constexpr int kPadBytes = 64;
// Sums of a tile and 8 rows of x, per warp: rows of 16 features, 4 words apart, again for the banks.
[[maybe_unused]] constexpr int kSumsPitch = 20;
[[maybe_unused]] constexpr int kSumsWords = 8 * kSumsPitch;

#if __CUDA_ARCH__ >= 900

// The rows of a weight that one block computes, in passes of at most kMaxTiles tiles, each over all columns. A unit is
// an output feature: a row of the weight, or a gate's row and that of its `up`.
template <int kUnits, int kMaxTiles> struct Share {
    int begin, end, tiles, tiles_each, passes;

    __device__ explicit Share(int features) {
        begin = static_cast<int>(static_cast<long long>(features) * blockIdx.x / gridDim.x);
        end = static_cast<int>(static_cast<long long>(features) * (blockIdx.x + 1) / gridDim.x);
        tiles = (end - begin + kUnits - 1) / kUnits;
        const int least = (tiles + kMaxTiles - 1) / kMaxTiles;
        tiles_each = least ? (tiles + least - 1) / least : 0;
        passes = tiles_each ? (tiles + tiles_each - 1) / tiles_each : 0;
    }
    __device__ int tiles_in(int pass) const { return min(tiles_each, tiles - pass * tiles_each); }
    __device__ int first(int pass, int tile) const { return begin + (pass * tiles_each + tile) * kUnits; }
    __device__ int units_at(int first) const { return min(kUnits, end - first); }
};

template <typename T, int kPiece, int kGroups, int kMaxTiles, bool kGated> struct Product {
    static constexpr int kPitch = kPiece * sizeof(T) + kPadBytes;
    // Each warp takes 32 of every 256 columns.
    static constexpr int kBlocks = kPiece / 32 / kConsumers;
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    static constexpr int kRounds = (kMaxTiles * kGroups + 1) / 2;

    const T *x, *weight, *bias, *residual;
    T* out;
    float* parts;
    int rows, features, width;
    Ring ring;
    Share<kUnits, kMaxTiles> share;

    // --- the producer's warp ---

    // The whole warp computes the same addresses and one lane copies: a loop over lanes would take longer than the data.
    __device__ void put_tile(int first, int column, unsigned long long policy) {
        const unsigned bytes = sizeof(T) * min(kPiece, width - column), to = ring.here(), barrier = ring.full_here();
        const int count = share.units_at(first);
        const T* from = weight + static_cast<long long>(first) * width + column;
        const T* other = from + static_cast<long long>(features) * width;
        if (elect()) {
            arrive_expecting(barrier, count * (kGated ? 2 : 1) * bytes);
#pragma unroll
            for (int row = 0; row < kUnits; ++row) {
                if (row >= count) break;
                const long long at = static_cast<long long>(row) * width;
                copy(to + row * kPitch, from + at, bytes, barrier, policy);
                if constexpr (kGated) copy(to + (kUnits + row) * kPitch, other + at, bytes, barrier, policy);
            }
        }
        ring.advance();
    }

    __device__ void produce() {
        const unsigned long long policy = read_once_policy();
        int put = 0;
        for (int pass = 0; pass < share.passes; ++pass)
            for (int column = 0; column < width; column += kPiece)
                for (int tile = 0; tile < share.tiles_in(pass); ++tile, ++put) {
                    if (put >= ring.stages) wait_for_phase(ring.empty_here(), ring.parity ^ 1);
                    put_tile(share.first(pass, tile), column, policy);
                }
    }

    // --- the consumers' warps: lane 4 g + q has rows g and g + 8 of a tile, row g of 8 rows of x, and of 32 columns
    // the eight from 8 q on, which stand for the columns that the instruction's fragments name ---

    float sums[kMaxTiles][kGroups][4];
    unsigned inputs[kBlocks][kGroups][4];

    __device__ static int warp() { return threadIdx.x / 32; }
    __device__ static int lane() { return threadIdx.x % 32; }
    __device__ static int column_of(int block) { return block * 32 * kConsumers + warp() * 32; }

    __device__ void fetch_inputs(int piece_column) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const int row = group * 8 + lane() / 4, column = piece_column + column_of(block);
                const T* from = x + static_cast<long long>(row) * width + column + lane() % 4 * 8;
                if (row < rows && column < width) load_words(inputs[block][group], from);
            }
    }

    // A block's columns of rows g and g + 8.
    using Left = unsigned[2][4];

    __device__ static void load_left(Left& to, unsigned from, int block) {
        load_shared_words(to[0], from + column_of(block) * 2);
        load_shared_words(to[1], from + column_of(block) * 2 + 8 * kPitch);
    }

    template <bool kWhole> __device__ void add_tile(float (&to)[kGroups][4], int columns) {
        wait_for_phase(ring.full_here(), ring.parity);
        const unsigned from = ring.here() + lane() / 4 * kPitch + lane() % 4 * 16;
        Left left[2];
        if (kWhole || column_of(0) < columns) load_left(left[0], from, 0);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            if (block + 1 < kBlocks && (kWhole || column_of(block + 1) < columns))
                load_left(left[(block + 1) % 2], from, block + 1);
            if (!kWhole && column_of(block) >= columns) continue;
            const Left& a = left[block % 2];
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const unsigned(&b)[4] = inputs[block][group];
                multiply_add<T>(to[group], a[0][0], a[1][0], a[0][1], a[1][1], b[0], b[1]);
                multiply_add<T>(to[group], a[0][2], a[1][2], a[0][3], a[1][3], b[2], b[3]);
            }
        }
        release(ring.empty_here());
        ring.advance();
    }

    template <bool kWhole> __device__ void add_piece(int tiles, int column) {
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; ++tile)
            if (tile < tiles) add_tile<kWhole>(sums[tile], width - column);
        fetch_inputs(column + kPiece < width ? column + kPiece : 0);
    }

    // Of a round's two (tile, group): this thread's output. One tile's sums are 128 outputs, 256 threads make two.
    struct Output {
        int tile, x_row, first, unit;
        bool exists;
    };

    __device__ Output output_of(int round, int pass) const {
        const int which = 2 * round + threadIdx.x / 128, tile = which / kGroups;
        const int x_row = which % kGroups * 8 + threadIdx.x % 128 / 16, unit = threadIdx.x % 16;
        const int first = share.first(pass, tile);
        const bool exists = tile < share.tiles_in(pass) && x_row < rows && unit < share.units_at(first);
        return {tile, x_row, first, unit, exists};
    }

    // What is added to each output, fetched long before it is needed.
    __device__ void fetch_addends(float (&addends)[kRounds], int pass) const {
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
            const Output output = output_of(round, pass);
            const int feature = output.first + output.unit;
            addends[round] = 0.0f;
            if (kGated || !output.exists) continue;
            if (bias) addends[round] = to_float(bias[feature]);
            if (residual) addends[round] += to_float(residual[static_cast<long long>(output.x_row) * features + feature]);
        }
    }

    __device__ void show_sums(int round) const {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            if (2 * round + which >= kMaxTiles * kGroups) continue;
            const float(&from)[4] = sums[(2 * round + which) / kGroups][(2 * round + which) % kGroups];
            float* to = parts + (warp() * 2 + which) * kSumsWords + lane() % 4 * 2 * kSumsPitch + lane() / 4;
            to[0] = from[0], to[kSumsPitch] = from[1], to[8] = from[2], to[kSumsPitch + 8] = from[3];
        }
    }

    __device__ static void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory"); }

    // Every thread adds the warps' sums of its output, warp 0's first.
    __device__ void put_outputs(int round, int pass, float addend) const {
        const Output output = output_of(round, pass);
        const float* column = parts + threadIdx.x / 128 * kSumsWords + threadIdx.x % 128 / 16 * kSumsPitch + output.unit;
        float sum = 0.0f, other = 0.0f;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) {
            sum += column[i * 2 * kSumsWords];
            if (kGated && output.unit < kUnits) other += column[i * 2 * kSumsWords + kUnits];
        }
        if (!output.exists) return;
        float result = sum + addend;
        // Rounded where the product, silu and the product of both would have been, one after the other.
        if constexpr (kGated) result = rounded<T>(silu<T>(rounded<T>(sum))) * rounded<T>(other);
        out[static_cast<long long>(output.x_row) * features + output.first + output.unit] = from_float<T>(result);
    }

    __device__ void consume() {
        fetch_inputs(0);
        for (int pass = 0; pass < share.passes; ++pass) {
            const int tiles = share.tiles_in(pass);
            float addends[kRounds];
            fetch_addends(addends, pass);
#pragma unroll
            for (int i = 0; i < kMaxTiles * kGroups * 4; ++i) sums[i / kGroups / 4][i / 4 % kGroups][i % 4] = 0.0f;
            int column = 0;
            for (; column + kPiece <= width; column += kPiece) add_piece<true>(tiles, column);
            if (column < width) add_piece<false>(tiles, column);
#pragma unroll
            for (int round = 0; round < kRounds; ++round) {
                if (2 * round / kGroups >= tiles) break;
                show_sums(round);
                sync_consumers();
                put_outputs(round, pass, addends[round]);
                sync_consumers();
            }
        }
    }
};

#endif

template <typename T, int kPiece, int kGroups, int kMaxTiles, bool kGated>
__device__ __forceinline__ void stream_linear(
    const T* x, const T* weight, const T* bias, const T* residual, T* out, int rows, int features, int width,
    int num_stages) {
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) unsigned char shared[];
    let_next_begin();
    using Work = Product<T, kPiece, kGroups, kMaxTiles, kGated>;
    const unsigned base = shared_address(shared), parts = num_stages * kTileRows * Work::kPitch;
    const unsigned full = base + parts + 2 * kConsumers * kSumsWords * 4;
    const Ring ring{base, kTileRows * Work::kPitch, full, full + 8 * num_stages, num_stages, 0, 0};
    if (threadIdx.x == 0) {
        ring.init(kConsumers);
        publish_barriers();
    }
    __syncthreads();
    Work work{x, weight, bias, residual, out, reinterpret_cast<float*>(shared + parts), rows, features, width, ring,
              Share<Work::kUnits, kMaxTiles>(features)};
    if (threadIdx.x / 32 == kConsumers) {
        work.produce();
    } else {
        wait_for_previous();
        work.consume();
    }
#endif
}

}  // namespace

// Pieces of 2 KB a row where registers allow it: a copy of that size costs the copy engine little more than one of 1 KB.
#define STREAM(NAME, T, KIND, GATED, PIECE, GROUPS, TILES)                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) small_linear_##NAME##_##KIND##_##GROUPS(          \
        const T* x, const T* weight, const T* bias, const T* residual, T* out, int rows, int features, int width, \
        int num_stages) {                                                                                       \
        stream_linear<T, PIECE, GROUPS, TILES, GATED>(                                                          \
            x, weight, bias, residual, out, rows, features, width, num_stages);                                 \
    }
#define GROUPS(NAME, T, KIND, GATED)            \
    STREAM(NAME, T, KIND, GATED, 1024, 1, 6)    \
    STREAM(NAME, T, KIND, GATED, 1024, 2, 6)
#define STREAMS(NAME, T)                        \
    GROUPS(NAME, T, plain, false)               \
    GROUPS(NAME, T, gated, true)
STREAMS(float16, float16)
STREAMS(bfloat16, bfloat16)
