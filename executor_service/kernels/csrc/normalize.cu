// uint8 levels to floats by a table with one row of 256 levels per channel.
#include "dependent.cuh"
#include "levels.cuh"
#include "packs.cuh"

namespace {

constexpr int kInFlight = 4;

// Planes of `packs` packs of kWide<T> levels, each of one channel; `pieces` blocks per plane.
template <typename T>
__device__ __forceinline__ void normalize_planes(
    const unsigned char* __restrict__ levels, const float* __restrict__ table, T* __restrict__ out, int packs,
    int num_channels, int pieces) {
    constexpr int kCount = kWide<T>;
    using Levels = Pack<unsigned char, kCount>;
    __shared__ T values[kLevels];
    let_next_begin();
    const unsigned plane = blockIdx.x / pieces, first = blockIdx.x % pieces * kInFlight * blockDim.x + threadIdx.x;
    const long long begin = static_cast<long long>(plane) * packs;
    wait_for_previous();
    Levels loaded[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
        const unsigned i = first + k * blockDim.x;
        if (i < packs) loaded[k] = load<unsigned char, kCount>(levels + (begin + i) * kCount);
    }
    const float* row = table + plane % num_channels * kLevels;
    const Line line = line_of(row);
    const bool is_line = __syncthreads_and(store_table(row, values, 1));
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
        const unsigned i = first + k * blockDim.x;
        if (i >= packs) continue;
        Pack<T, kCount> pack;
        if (is_line) {
            Floats<kCount> elements;
            const unsigned* words = reinterpret_cast<const unsigned*>(&loaded[k]);
#pragma unroll
            for (int e = 0; e < kCount; e += 2) {
                const unsigned two = words[e / 4] >> (e % 4 * 8);
                elements.elements[e] = on(line, first_level(two));
                elements.elements[e + 1] = on(line, second_level(two));
            }
            pack = pack_of<T>(elements);
        } else {
#pragma unroll
            for (int e = 0; e < kCount; ++e) pack.elements[e] = values[loaded[k].elements[e]];
        }
        store<T, kCount>(out + (begin + i) * kCount, pack);
    }
}

// Any shape: element i is of channel i / inner % num_channels.
template <typename T>
__device__ __forceinline__ void normalize_elements(
    const unsigned char* __restrict__ levels, const float* __restrict__ table, T* __restrict__ out, long long count,
    long long inner, int num_channels) {
    let_next_begin();
    wait_for_previous();
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride)
        out[i] = from_float<T>(table[i / inner % num_channels * kLevels + levels[i]]);
}

}  // namespace

#define KERNELS(NAME, T)                                                                                         \
    extern "C" __global__ void normalize_##NAME##_wide(                                                          \
        const unsigned char* levels, const float* table, T* out, int packs, int num_channels, int pieces) {      \
        normalize_planes<T>(levels, table, out, packs, num_channels, pieces);                                    \
    }                                                                                                            \
    extern "C" __global__ void normalize_##NAME##_single(                                                        \
        const unsigned char* levels, const float* table, T* out, long long count, long long inner,               \
        int num_channels) {                                                                                      \
        normalize_elements<T>(levels, table, out, count, inner, num_channels);                                   \
    }
FOR_EACH_DTYPE(KERNELS)
