// How small_linear_tiles.cu divides its work: which steps of which tiles a block has, and how blocks that share a tile
// add up.
#pragma once

#include "small_linear_parts.cuh"
#include "warpgroup.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile's product is so many steps of 64 columns. The steps of all tiles, one tile after the other, are cut into equal
// ranges, one per cluster; a cluster's blocks stand beside each other in every tile. A tile belongs to the range that
// has its first step, at that range's end; the ranges behind it, which begin with the tile's other steps, leave sums.
// Ranges count down over blocks, so that who waits does so for blocks that began no later.
struct Share {
    int steps, total, num_ranges, index, begin, end;

    __device__ Share(int tiles, int steps, int cluster)
        : steps(steps), total(tiles * steps), num_ranges(gridDim.x / cluster),
          index(num_ranges - 1 - blockIdx.x / cluster), begin(begin_of(index)), end(begin_of(index + 1)) {}
    __device__ int begin_of(int range) const {
        return static_cast<int>(static_cast<long long>(total) * range / num_ranges);
    }
    // Ranges from `index` + 1 up to this one have steps of a tile that ends before step `tile_end`.
    __device__ int last_of(int tile_end) const {
        int last = index;
        while (last + 1 < num_ranges && begin_of(last + 1) < tile_end) ++last;
        return last;
    }
};

// Sums of one tile that a block leaves for another, and a flag per warp: 1 when they are there; 0 before and after.
// Each thread finds there what the thread with its number has left.
template <int kCount, int kThreads> struct Leftovers {
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kTogether = kCount > 32 ? 3 : 4;  // packs of four sums in one go, as registers allow

    float* sums;
    int* flags;
    int num_packs;  // that have rows of x

    __device__ float* pack(int block, int number) const {
        return sums + ((static_cast<long long>(block) * (kCount / 4) + number) * kThreads + threadIdx.x) * 4;
    }
    __device__ int* flag(int block) const { return flags + block * kWarps + threadIdx.x / 32; }

    __device__ void leave(const float (&from)[kCount], int block) const {
#pragma unroll
        for (int i = 0; i < kCount / 4; ++i) {
            if (i >= num_packs) break;
            asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(pack(block, i)), "f"(from[4 * i]),
                         "f"(from[4 * i + 1]), "f"(from[4 * i + 2]), "f"(from[4 * i + 3]) : "memory");
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) asm volatile("st.release.gpu.s32 [%0], 1;" ::"l"(flag(block)) : "memory");
    }

    // Lanes look at a flag each, of blocks `first`, `first` + `stride`, … ; and put it back.
    __device__ void wait(int first, int stride, int count) const {
        for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
            int* at = flag(first + i * stride);
            int is_there;
            do {
                asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(is_there) : "l"(at) : "memory");
            } while (!is_there);
            asm volatile("st.relaxed.gpu.s32 [%0], 0;" ::"l"(at) : "memory");
        }
        __syncwarp();
    }

    struct Packs {
        float values[kTogether][4];
    };
    __device__ void fetch(Packs& to, int block, int first) const {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if ((first + i) * 4 >= kCount || first + i >= num_packs) break;
            float(&at)[4] = to.values[i];
            asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(at[0]), "=f"(at[1]), "=f"(at[2]), "=f"(at[3]) : "l"(pack(block, first + i)) : "memory");
        }
    }
    __device__ void add_packs(float (&to)[kCount], const Packs& from, int first) const {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if ((first + i) * 4 >= kCount || first + i >= num_packs) break;
#pragma unroll
            for (int e = 0; e < 4; ++e) to[(first + i) * 4 + e] += from.values[i][e];
        }
    }
    // In the order of the blocks named; loads of up to four blocks are under way at a time.
    __device__ void add(float (&to)[kCount], int first, int stride, int count) const {
        wait(first, stride, count);
#pragma unroll
        for (int packs = 0; packs < kCount / 4; packs += kTogether) {
            if (packs >= num_packs) break;
#pragma unroll 1
            for (int i = 0; i < count; i += 4) {
                Packs from[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (i + e < count) fetch(from[e], first + (i + e) * stride, packs);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (i + e < count) add_packs(to, from[e], packs);
            }
        }
    }
};

#endif
