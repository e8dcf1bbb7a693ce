// How small_linear's kernels divide their work, and their rings of stages in shared memory.
#pragma once

#include "small_linear_parts.cuh"

// Rows in shared memory lie 16 bytes further apart than they are long: ldmatrix then meets no bank conflicts.
[[maybe_unused]] constexpr int kPadBytes = 16;

// As silu_mul has it.
template <typename T> __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

template <> __device__ __forceinline__ float silu<float>(float x) { return x / (1.0f + expf(-x)); }

#if __CUDA_ARCH__ >= 900

// The rows of a weight that one block computes: tiles of `units`, in passes of at most `max_tiles`, each pass over all
// columns. A unit is an output feature: a row of the weight, or a gate's row and that of its `up`.
struct Share {
    int begin, end, units, tiles, tiles_each, passes;

    // The share of block `index` of `count`.
    __device__ Share(int features, int units_each, int max_tiles, int index, int count) : units(units_each) {
        begin = static_cast<int>(static_cast<long long>(features) * index / count);
        end = static_cast<int>(static_cast<long long>(features) * (index + 1) / count);
        tiles = (end - begin + units - 1) / units;
        const int least = (tiles + max_tiles - 1) / max_tiles;
        tiles_each = least ? (tiles + least - 1) / least : 0;
        passes = tiles_each ? (tiles + tiles_each - 1) / tiles_each : 0;
    }
    __device__ int tiles_in(int pass) const { return min(tiles_each, tiles - pass * tiles_each); }
    __device__ int first(int pass, int tile) const { return begin + (pass * tiles_each + tile) * units; }
    __device__ int units_at(int first) const { return min(units, end - first); }
};

// Where a walk over (pass, piece of columns, tile) stands; `sequence` counts pieces.
struct Position {
    int pass = 0, piece = 0, tile = 0, sequence = 0;

    __device__ void advance(const Share& share, int pieces) {
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
    __device__ void init(int consumers) const {
        for (int i = 0; i < stages; ++i) {
            init_barrier(full + 8 * i, 1);
#ifdef SMALL_LINEAR_ALL_ARRIVE
            init_barrier(empty + 8 * i, consumers * 32);
#else
            init_barrier(empty + 8 * i, consumers);
#endif
        }
    }
};

// Where a weight's tiles lie in memory; its elements have two bytes.
struct Matrix {
    const unsigned char* weight;
    int features, width, piece_columns, pieces;
    bool is_gated;
    Share share;

    __device__ Matrix(
        const void* weight, int features, int width, bool is_gated, int tile_rows, int max_tiles, int piece_columns)
        : weight(static_cast<const unsigned char*>(weight)), features(features), width(width),
          piece_columns(piece_columns), pieces((width + piece_columns - 1) / piece_columns), is_gated(is_gated),
          share(features, is_gated ? tile_rows / 2 : tile_rows, max_tiles, blockIdx.x, gridDim.x) {}

    __device__ long long row_bytes() const { return 2LL * width; }
    __device__ unsigned bytes_of(int piece) const { return 2 * min(piece_columns, width - piece * piece_columns); }
    __device__ const unsigned char* source(const Position& at) const {
        return weight + share.first(at.pass, at.tile) * row_bytes() + 2LL * at.piece * piece_columns;
    }
};

// Brings the first `stages` tiles of the weight that the next kernel multiplies with into the L2 cache, beyond those that
// it has asked for itself by then (`skipped`): so memory has work while one kernel ends and the other begins.
__device__ __forceinline__ void prefetch_tiles(const Matrix& matrix, int skipped, int stages) {
    Position at;
    for (int i = 0; i < skipped + stages && at.pass < matrix.share.passes; ++i) {
        const unsigned bytes = matrix.bytes_of(at.piece);
        const int count = matrix.share.units_at(matrix.share.first(at.pass, at.tile));
        const unsigned char* from = matrix.source(at);
        const long long pitch = matrix.row_bytes();
        if (i >= skipped && elect()) {
            for (int row = 0; row < count; ++row) {
                prefetch(from + row * pitch, bytes);
                if (matrix.is_gated) prefetch(from + (row + matrix.features) * pitch, bytes);
            }
        }
        at.advance(matrix.share, matrix.pieces);
    }
}

#endif
