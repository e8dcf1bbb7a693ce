// uint8 tiles to the rows of a patch product: normalised by table, rounded, patches unfolded, in one pass.
#include "dependent.cuh"
#include "numbers.cuh"

namespace {

constexpr int kLevels = 256;
constexpr int kInFlight = 4;

// How many copies of the table a block has: lanes that look up different levels of one copy collide.
template <typename T> constexpr int kCopies = 32 / sizeof(T);

}  // namespace

struct Shape {
    int num_channels, height, width, patch, columns, pitch;
};

namespace {

// blockIdx.x is one row of patches of one tile: `patch` rows of each channel, which lie together in memory, become
// width / patch rows of the result, which do so too. In between they stand in shared memory as elements of the result,
// `pitch` from row to row. Thread t has pack t % packs of a row of the result, and every (blockDim.x / packs)-th row.
// Patches have an even side, the rest is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void image_patches_wide(
    const uint4* __restrict__ tiles, const float* __restrict__ table, T* __restrict__ out, const Shape& shape) {
    extern __shared__ uint4 shared[];
    constexpr int kCount = 16 / sizeof(T);
    T* values = reinterpret_cast<T*>(shared);
    T* rows = values + shape.num_channels * kLevels * kCopies<T>;
    let_next_begin();
    const unsigned patch = shape.patch, width = shape.width, pitch = shape.pitch;
    const unsigned patch_rows = shape.height / patch, tile = blockIdx.x / patch_rows;
    const unsigned row_packs = width / 16, channel_packs = patch * row_packs;
    const unsigned all_packs = shape.num_channels * channel_packs, plane_packs = shape.height * row_packs;
    const uint4* from = tiles + static_cast<long long>(tile) * shape.num_channels * plane_packs +
                        (blockIdx.x - tile * patch_rows) * channel_packs;
    wait_for_previous();
    for (unsigned begin = 0; begin < all_packs; begin += kInFlight * blockDim.x) {
        uint4 packs[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const unsigned i = begin + k * blockDim.x + threadIdx.x, channel = i / channel_packs;
            if (i < all_packs) packs[k] = from[channel * plane_packs + i - channel * channel_packs];
        }
        if (begin == 0) {
            for (unsigned i = threadIdx.x; i < shape.num_channels * kLevels; i += blockDim.x) {
                Pack<T, kCount> copies;
                const T value = from_float<T>(table[i]);
#pragma unroll
                for (int e = 0; e < kCount; ++e) copies.elements[e] = value;
#pragma unroll
                for (int e = 0; e < kCopies<T>; e += kCount) store<T, kCount>(values + i * kCopies<T> + e, copies);
            }
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const unsigned i = begin + k * blockDim.x + threadIdx.x, channel = i / channel_packs, row = i / row_packs;
            if (i >= all_packs) continue;
            const T* levels = values + channel * kLevels * kCopies<T> + threadIdx.x % kCopies<T>;
            const unsigned words[4] = {packs[k].x, packs[k].y, packs[k].z, packs[k].w};
            T* to = rows + row * pitch + (i - row * row_packs) * 16;
#pragma unroll
            for (int h = 0; h < 16 / kCount; ++h) {
                Pack<T, kCount> pack;
#pragma unroll
                for (int e = 0; e < kCount; ++e) {
                    const int at = h * kCount + e;
                    pack.elements[e] = levels[(words[at / 4] >> (at % 4 * 8) & 0xff) * kCopies<T>];
                }
                store<T, kCount>(to + h * kCount, pack);
            }
        }
    }
    __syncthreads();
    const unsigned packs = shape.columns / kCount, patches = width / patch, area = patch * patch;
    const unsigned at = threadIdx.x % packs * kCount;
    int offsets[kCount / 2];
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
        const unsigned column = at + e, row = column / patch;
        offsets[e / 2] = column < shape.num_channels * area ? static_cast<int>(row * pitch + column - row * patch) : -1;
    }
    T* to = out + static_cast<long long>(blockIdx.x) * patches * shape.columns + at;
    for (unsigned i = threadIdx.x / packs; i < patches; i += blockDim.x / packs) {
        Pack<T, kCount> pack;
#pragma unroll
        for (int e = 0; e < kCount; e += 2) {
            Pack<T, 2> pair = {from_float<T>(0.0f), from_float<T>(0.0f)};
            if (offsets[e / 2] >= 0) pair = load<T, 2>(rows + offsets[e / 2] + i * patch);
            pack.elements[e] = pair.elements[0], pack.elements[e + 1] = pair.elements[1];
        }
        store<T, kCount>(to + static_cast<long long>(i) * shape.columns, pack);
    }
}

// Any shape, an element at a time.
template <typename T>
__device__ __forceinline__ void image_patches_single(
    const unsigned char* __restrict__ tiles, const float* __restrict__ table, T* __restrict__ out, const Shape& shape,
    long long count) {
    let_next_begin();
    wait_for_previous();
    const int patch_rows = shape.height / shape.patch, patches = shape.width / shape.patch;
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long row = i / shape.columns, tile = row / (patch_rows * patches);
        const int column = static_cast<int>(i - row * shape.columns);
        const int of_tile = static_cast<int>(row - tile * patch_rows * patches);
        const int channel = column / shape.patch / shape.patch;
        if (channel >= shape.num_channels) {
            out[i] = from_float<T>(0.0f);
            continue;
        }
        const int y = of_tile / patches * shape.patch + column / shape.patch % shape.patch;
        const int x = of_tile % patches * shape.patch + column % shape.patch;
        const long long at = ((tile * shape.num_channels + channel) * shape.height + y) * shape.width + x;
        out[i] = from_float<T>(table[channel * kLevels + tiles[at]]);
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(1024) image_patches_##NAME##_wide(                                  \
        const uint4* tiles, const float* table, T* out, int num_channels, int height, int width, int patch,          \
        int columns, int pitch) {                                                                                    \
        image_patches_wide<T>(tiles, table, out, {num_channels, height, width, patch, columns, pitch});              \
    }                                                                                                                \
    extern "C" __global__ void image_patches_##NAME##_single(                                                        \
        const unsigned char* tiles, const float* table, T* out, int num_channels, int height, int width, int patch,  \
        int columns, long long count) {                                                                              \
        image_patches_single<T>(tiles, table, out, {num_channels, height, width, patch, columns, 0}, count);         \
    }
FOR_EACH_DTYPE(KERNELS)
