// The order in which the warps of all blocks go through a chain of products (linear_chain.cu).
#pragma once

#include "small_linear_product.cuh"

constexpr int kMostLinks = 4;
constexpr int kLoaders = 4;  // warps that bring x
constexpr int kMostParts = 72;  // a row's squares are added up by so many clusters at most

// A product of x [rows, width], or of x normalised by its rows' squares, of which each cluster of the product before
// has left a part.
struct Link {
    Task task;  // without a map of x
    bool is_gated;
    const void* x;
    int width, num_parts;
    const void* norm_weight;  // none: x as it is
    const float* squares;
    float epsilon;
    float* squares_to;  // parts of the result's own, for the next; or none
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// How all blocks wait for each other, which are resident together. A block's clerk, a thread, speaks for it: it learns
// from its consumers that they have stored, tells the other blocks, hears of all and tells everybody in its block.
struct Meeting {
    unsigned stored, met;  // barriers in shared memory, of kConsumers arrivals and of one
    unsigned* arrivals;    // of all blocks; zero before the kernel, and after
    unsigned parity, target;

    __device__ void init() const {
        init_barrier(stored, kConsumers);
        init_barrier(met, 1);
    }

    // By all lanes of all consumers, before they hear.
    __device__ void say_stored() const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(stored);
    }

    __device__ void speak() {
        wait_for_phase(stored, parity);
        target += gridDim.x;
        count_arrival(arrivals);
        wait_for_arrivals(arrivals, target);
        arrive(met);
    }

    // What all blocks have stored is there.
    __device__ void hear() {
        wait_for_phase(met, parity);
        parity ^= 1;
    }

    // By the clerk. The last of those that wait for nobody any more leaves zero behind.
    __device__ void leave() const {
        if (count_leaving(arrivals) == target + gridDim.x - 1) *arrivals = 0;
    }
};

// One product after the other; all blocks meet in between.
template <typename Multiply, typename Meet>
__device__ __forceinline__ void follow(const Link* links, int num_links, const Multiply& multiply, const Meet& meet) {
#pragma unroll 1
    for (int i = 0; i < num_links; ++i) {
        const Link link = links[i];
        multiply(link);
        if (i + 1 < num_links) meet();
    }
}

// The loaders' part of a product: x to its ring, as copies of tensor maps would lay it out, by ordinary loads. The copy
// engine, which does what it is asked in order, would bring it behind all weights that a ring has room for.
template <typename T, int kRows> struct Inputs {
    static constexpr int kPieces = kRows / 16;  // of a stage that a thread has, eight elements of rows 16 apart
    static constexpr int kDepth = kRows == 16 ? 8 : kRows == 32 ? 4 : 3;  // stages on their way

    using Pieces = unsigned[kPieces][4];
    struct Coming {
        Pieces pieces;
        unsigned factors[4];
    };

    const Link& link;
    const int rows, pack, first_row, first_column, num_tiles;
    Ring& ring;

    __device__ Inputs(const Link& link, Room<kRows>& room, int rows)
        : link(link), rows(rows), pack(threadIdx.x % 8), first_row(static_cast<int>(threadIdx.x) / 8 % 16),
          first_column((room.exchange.rank * link.task.steps) * kColumns + pack * 8),
          num_tiles(tiles_of(link)), ring(room.inputs) {}

    __device__ static int tiles_of(const Link& link) {
        const int units = link.is_gated ? kTileRows / 2 : kTileRows;
        const int begin = static_cast<int>(blockIdx.x) / kSplits * link.task.range;
        const int end = min(begin + link.task.range, link.task.features);
        return end > begin ? (end - begin + units - 1) / units : 0;
    }

    // What is outside of x becomes zeros.
    template <bool kNormalizes> __device__ void fetch(Coming& to, int step) const {
        const int column = first_column + step * kColumns;
        const T* x = static_cast<const T*>(link.x);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const int row = first_row + 16 * piece;
            if (row < rows && column < link.width)
                load_words(to.pieces[piece], x + static_cast<long long>(row) * link.width + column);
            else to.pieces[piece][0] = to.pieces[piece][1] = to.pieces[piece][2] = to.pieces[piece][3] = 0;
        }
        if (kNormalizes && column < link.width)
            load_words(to.factors, static_cast<const T*>(link.norm_weight) + column);
    }

    template <bool kNormalizes> __device__ void put(Coming& from, const float (&scales)[kPieces]) const {
        wait_for_phase(ring.empty_here(), ring.parity ^ 1);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const int row = first_row + 16 * piece;
            if (row * kRowBytes >= static_cast<int>(ring.stride)) continue;
            if constexpr (kNormalizes) normalize<T>(from.pieces[piece], from.factors, scales[piece]);
            store_shared_words(ring.here() + row * kRowBytes + (pack ^ row % 8) * 16, from.pieces[piece]);
        }
        publish_shared_writes();
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(ring.full_here());
        ring.advance();
    }

    // The eight threads of a row add up its parts.
    __device__ void find_scales(float (&scales)[kPieces]) const {
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            const int row = first_row + 16 * piece;
            float sum = 0.0f;
            if (row < rows)
                for (int part = pack; part < link.num_parts; part += 8) sum += link.squares[row * kMostParts + part];
            scales[piece] = scale_of(sum_of_eight(sum) / link.width, link.epsilon);
        }
    }

    template <bool kNormalizes> __device__ void produce() const {
        const int steps = link.task.steps, count = num_tiles * steps;
        Coming coming[kDepth];
        float scales[kPieces] = {};
        int ahead = 0;
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            if (i < count) fetch<kNormalizes>(coming[i], ahead);
            if (++ahead == steps) ahead = 0;
        }
        if constexpr (kNormalizes) find_scales(scales);
#pragma unroll 1
        for (int done = 0; done < count; done += kDepth) {
#pragma unroll
            for (int i = 0; i < kDepth; ++i) {
                if (done + i >= count) break;
                put<kNormalizes>(coming[i], scales);
                if (done + i + kDepth < count) fetch<kNormalizes>(coming[i], ahead);
                if (++ahead == steps) ahead = 0;
            }
        }
    }

    __device__ void produce() const {
        if (link.norm_weight) produce<true>();
        else produce<false>();
    }
};

#endif
