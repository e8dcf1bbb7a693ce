// uint8 tiles to the rows of a patch product: normalised, rounded, patches unfolded, in one pass.
#include "dependent.cuh"
#include "early.cuh"
#include "levels.cuh"
#include "packs.cuh"

namespace {

__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace

// Exact for numbers and divisors from 2 on below 2^16: `reciprocal` is 2^32 / value, rounded up. A division by what is
// known only at the launch takes some twenty instructions, and there were more of these than of all else.
struct Divisor {
    unsigned value, reciprocal;
};

// A row of a tile has `row_packs` packs, the rows of a patch have `channel_packs` in each channel; a row of the result
// has `packs`. In shared memory rows lie `pitch` bytes apart.
struct Shape {
    unsigned num_channels, height, width, columns, pitch;
    Divisor patch, packs, row_packs, channel_packs;
};

namespace {

__device__ __forceinline__ unsigned operator/(unsigned number, const Divisor& by) {
    return __umulhi(number, by.reciprocal);
}

__device__ __forceinline__ unsigned patches_of(const Shape& shape) { return shape.width / shape.patch; }

// What a thread needs of its pairs of neighbouring columns, the same in every patch.
template <int kPairs> struct Pairs {
    unsigned offsets[kPairs];  // in the levels; two neighbours are one access, for patches have an even side
    int channels[kPairs];      // -1: columns that are 0
};

template <int kPairs> __device__ __forceinline__ Pairs<kPairs> pairs_at(unsigned column, const Shape& shape) {
    Pairs<kPairs> pairs;
#pragma unroll
    for (int i = 0; i < kPairs; ++i, column += 2) {
        const unsigned row = column / shape.patch, channel = row / shape.patch;
        const bool is_pixel = channel < shape.num_channels;
        pairs.offsets[i] = is_pixel ? row * shape.pitch + column - row * shape.patch.value : 0;
        pairs.channels[i] = is_pixel ? static_cast<int>(channel) : -1;
    }
    return pairs;
}

__device__ __forceinline__ unsigned two_levels(const unsigned char* from) {
    return *reinterpret_cast<const unsigned short*>(from);
}

// This thread's packs of the rows of one row of patches, from the levels in shared memory: every value computed.
template <typename T>
__device__ __forceinline__ void store_computed(
    const unsigned char* levels, const Pairs<kWide<T> / 2>& pairs, const Line (&lines)[kWide<T> / 2], T* to,
    unsigned first, unsigned step, const Shape& shape) {
    for (unsigned i = first, end = patches_of(shape); i < end; i += step) {
        Floats<kWide<T>> elements;
#pragma unroll
        for (int k = 0; k < kWide<T> / 2; ++k) {
            const unsigned two = two_levels(levels + pairs.offsets[k] + i * shape.patch.value);
            elements.elements[2 * k] = on(lines[k], first_level(two));
            elements.elements[2 * k + 1] = on(lines[k], second_level(two));
        }
        store<T, kWide<T>>(to + static_cast<long long>(i) * shape.columns, pack_of<T>(elements));
    }
}

// The same with every value looked up in `values`, which has kLevels for each channel.
template <typename T>
__device__ __forceinline__ void store_looked_up(
    const unsigned char* levels, const Pairs<kWide<T> / 2>& pairs, const T* values, T* to, unsigned first,
    unsigned step, const Shape& shape) {
    for (unsigned i = first, end = patches_of(shape); i < end; i += step) {
        Pack<T, kWide<T>> pack;
#pragma unroll
        for (int k = 0; k < kWide<T> / 2; ++k) {
            pack.elements[2 * k] = pack.elements[2 * k + 1] = from_float<T>(0.0f);
            if (pairs.channels[k] < 0) continue;
            const unsigned two = two_levels(levels + pairs.offsets[k] + i * shape.patch.value);
            pack.elements[2 * k] = values[pairs.channels[k] * kLevels + (two & 0xff)];
            pack.elements[2 * k + 1] = values[pairs.channels[k] * kLevels + (two >> 8)];
        }
        store<T, kWide<T>>(to + static_cast<long long>(i) * shape.columns, pack);
    }
}

// blockIdx.x is one row of patches of one tile: some rows of each channel, which lie together in memory, become
// width / patch rows of the result, which do so too. In between the levels stand in shared memory. Thread t has pack
// t % packs of a row of the result, and every (blockDim.x / packs)-th row.
// Everything but the levels is worked out before the kernel before has ended, which is not the one that writes the table.
template <typename T>
__device__ __forceinline__ void image_patches_wide(
    const uint4* __restrict__ tiles, const float* __restrict__ table, T* __restrict__ out, const Shape& shape) {
    extern __shared__ uint4 shared[];
    constexpr int kPairs = kWide<T> / 2;
    T* values = reinterpret_cast<T*>(shared);
    unsigned char* levels = reinterpret_cast<unsigned char*>(values + shape.num_channels * kLevels);
    const unsigned patch_rows = shape.height / shape.patch, tile = blockIdx.x / patch_rows;
    const unsigned channel_packs = shape.channel_packs.value, row_packs = shape.row_packs.value;
    const unsigned all_packs = shape.num_channels * channel_packs, plane_packs = shape.height * row_packs;
    const uint4* from = tiles + static_cast<long long>(tile) * shape.num_channels * plane_packs +
                        (blockIdx.x - tile * patch_rows) * channel_packs;
    for (unsigned channel = threadIdx.x; channel < shape.num_channels; channel += blockDim.x)
        bring_near(from + channel * plane_packs, channel_packs * 16);
    const bool is_line = store_table(table, values, shape.num_channels);
    const unsigned first = threadIdx.x / shape.packs, step = blockDim.x / shape.packs;
    const unsigned at = (threadIdx.x - first * shape.packs.value) * kWide<T>;
    const Pairs<kPairs> pairs = pairs_at<kPairs>(at, shape);
    Line lines[kPairs];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
        lines[k] = {0.0f, 0.0f};
        if (pairs.channels[k] >= 0) lines[k] = line_of(table + pairs.channels[k] * kLevels);
    }
    T* to = out + static_cast<long long>(blockIdx.x) * patches_of(shape) * shape.columns + at;
    wait_for_previous();
    let_next_begin();  // not before: its blocks would have the room of this one's last
    for (unsigned i = threadIdx.x; i < all_packs; i += blockDim.x) {
        const unsigned channel = i / shape.channel_packs, row = i / shape.row_packs;
        copy_async(
            levels + row * shape.pitch + (i - row * row_packs) * 16,
            from + channel * plane_packs + i - channel * channel_packs);
    }
    wait_for_copies();
    if (__syncthreads_and(is_line)) {
        store_computed<T>(levels, pairs, lines, to, first, step, shape);
    } else {
        unsigned column = at;  // pairs anew: all of them kept until here take more registers than there are
        asm volatile("" : "+r"(column));
        store_looked_up<T>(levels, pairs_at<kPairs>(column, shape), values, to, first, step, shape);
    }
}

// Any shape, an element at a time.
template <typename T>
__device__ __forceinline__ void image_patches_single(
    const unsigned char* __restrict__ tiles, const float* __restrict__ table, T* __restrict__ out, int num_channels,
    int height, int width, int patch, int columns, long long count) {
    let_next_begin();
    wait_for_previous();
    const int patch_rows = height / patch, patches = width / patch;
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long row = i / columns, tile = row / (patch_rows * patches);
        const int column = static_cast<int>(i - row * columns);
        const int of_tile = static_cast<int>(row - tile * patch_rows * patches);
        const int channel = column / patch / patch;
        if (channel >= num_channels) {
            out[i] = from_float<T>(0.0f);
            continue;
        }
        const int y = of_tile / patches * patch + column / patch % patch;
        const int x = of_tile % patches * patch + column % patch;
        const long long at = ((tile * num_channels + channel) * height + y) * width + x;
        out[i] = from_float<T>(table[channel * kLevels + tiles[at]]);
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(512, 4) image_patches_##NAME##_wide(                                \
        const uint4* tiles, const float* table, T* out, const __grid_constant__ Shape shape) {                       \
        image_patches_wide<T>(tiles, table, out, shape);                                                             \
    }                                                                                                                \
    extern "C" __global__ void image_patches_##NAME##_single(                                                        \
        const unsigned char* tiles, const float* table, T* out, int num_channels, int height, int width, int patch,  \
        int columns, long long count) {                                                                              \
        image_patches_single<T>(tiles, table, out, num_channels, height, width, patch, columns, count);              \
    }
FOR_EACH_DTYPE(KERNELS)
