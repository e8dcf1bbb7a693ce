// Prefill attention with the tensor cores of sm_80 and later (mma.sync): 16-bit types, heads of 64 and 128, any block
// size. Eight warps have 16 queries each; keys and values come in tiles of 64 tokens, two tiles in shared memory.
//
// After FlashAttention-2 (Dao, 2023): scores stay in registers, softmax goes along with the tiles.
#include "dependent.cuh"
#include "paged_prefill_attention.cuh"

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;
constexpr int kKeys = 64;

// Rows of kDim 16-bit elements in shared memory; the 16-byte packs of a row trade places so that eight rows of one
// column lie in different banks.
template <int kDim> struct Tile {
    static constexpr int kPacks = kDim / 8;
    static __device__ __forceinline__ unsigned at(unsigned base, int row, int pack) {
        return base + (row * kPacks + (pack ^ (row % 8))) * 16;
    }
};

__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

#define MULTIPLY(T, NAME)                                                                                           \
    __device__ __forceinline__ void multiply(                                                                       \
        T, float* sums, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {             \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                         \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                   \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                       \
    }
MULTIPLY(bfloat16, "bf16")
MULTIPLY(float16, "f16")

// Where tokens lie in the cache. A thread copies the same pack of every kStep-th token of a tile.
template <typename T, int kDim> struct Gather {
    static constexpr int kStep = kThreads / Tile<kDim>::kPacks;
    static constexpr int kEach = kKeys / kStep;

    const T *keys, *values;
    const int* table;
    int block_size, length, token_stride;
    int blocks[kEach];

    __device__ __forceinline__ int token(int tile, int i) const {
        return tile * kKeys + static_cast<int>(threadIdx.x) / Tile<kDim>::kPacks + i * kStep;
    }
    // Looks a tile's blocks up, long before its copies need them.
    __device__ __forceinline__ void look_up(int tile) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) blocks[i] = table[min(token(tile, i), length - 1) / block_size];
    }
    // Rows behind the request's last token become zeros: whatever lies there, it must not meet a weight of zero.
    __device__ __forceinline__ void copy(int tile, unsigned to_keys, unsigned to_values) const {
        const int pack = threadIdx.x % Tile<kDim>::kPacks;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int place = token(tile, i);
            const bool valid = place < length;
            const int in_block = valid ? place % block_size : 0;
            const long long from =
                (static_cast<long long>(blocks[i]) * block_size + in_block) * token_stride + pack * 8;
            prefill::copy_async(Tile<kDim>::at(to_keys, place - tile * kKeys, pack), keys + from, valid);
            prefill::copy_async(Tile<kDim>::at(to_values, place - tile * kKeys, pack), values + from, valid);
        }
    }
};

// 16 queries x kKeys keys.
template <typename T, int kDim>
__device__ __forceinline__ void query_times_keys(float (&scores)[kKeys / 2], unsigned queries, unsigned keys) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (float& score : scores) score = 0.0f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
        unsigned a[4];
        load_matrices(a, Tile<kDim>::at(queries, 16 * warp + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
            unsigned b[4];
            load_matrices(b, Tile<kDim>::at(keys, 16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            multiply(T(), scores + 8 * n, a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply(T(), scores + 8 * n + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// outputs += 16 rows of weights x kKeys values.
template <typename T, int kDim>
__device__ __forceinline__ void add_weighted_values(
    float (&outputs)[kDim / 2], const unsigned (&weights)[kKeys / 4], unsigned values) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
        const unsigned* a = weights + 4 * k;
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            unsigned b[4];
            load_matrices_transposed(b, Tile<kDim>::at(values, 16 * k + lane % 16, 2 * n + lane / 16));
            multiply(T(), outputs + 8 * n, a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply(T(), outputs + 8 * n + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// A warp's 16 rows through its own part of the queries' shared memory, so that stores are 16 bytes wide.
template <typename T, int kDim>
__device__ __forceinline__ void store_rows(
    const float (&outputs)[kDim / 2], unsigned char* shared, unsigned queries, T* to, int row_stride, int num_rows) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
#pragma unroll
    for (int i = 0; i < kDim / 4; ++i) {
        const int row = first + lane / 4 + i % 2 * 8;
        const unsigned at = Tile<kDim>::at(0, row, i / 2) + lane % 4 * 4;
        *reinterpret_cast<unsigned*>(shared + at) = prefill::pair<T>(outputs[2 * i], outputs[2 * i + 1]);
    }
    __syncwarp();
    constexpr int kPacks = Tile<kDim>::kPacks;
#pragma unroll
    for (int i = 0; i < 16 * kPacks / 32; ++i) {
        const int row = first + (32 * i + lane) / kPacks, pack = lane % kPacks;
        if (row >= num_rows) continue;
        const uint4 content = *reinterpret_cast<const uint4*>(shared + Tile<kDim>::at(0, row, pack));
        *reinterpret_cast<uint4*>(to + static_cast<long long>(row) * row_stride + pack * 8) = content;
    }
}

template <typename T, int kDim>
__device__ __forceinline__ void copy_queries(unsigned to, const T* from, int row_stride, int num_rows) {
    constexpr int kPacks = Tile<kDim>::kPacks;
#pragma unroll
    for (int i = 0; i < kRows * kPacks / kThreads; ++i) {
        const int row = (kThreads * i + static_cast<int>(threadIdx.x)) / kPacks, pack = threadIdx.x % kPacks;
        const bool valid = row < num_rows;
        prefill::copy_async(
            Tile<kDim>::at(to, row, pack), from + static_cast<long long>(valid ? row : 0) * row_stride + pack * 8,
            valid);
    }
}

// Grid (heads, tiles of the longest chunk, requests).
template <typename T, int kDim, bool kSpans>
__device__ __forceinline__ void attend(
    const T* __restrict__ query, const T* __restrict__ k_cache, const T* __restrict__ v_cache,
    const int* __restrict__ block_tables, const int* __restrict__ cu_seqlens, const int* __restrict__ seq_lens,
    T* __restrict__ out, int num_kv_heads, int block_size, long long table_stride, float scale, int window,
    float softcap, const int* __restrict__ visible_ends) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int kTileBytes = kKeys * kDim * 2;
    const unsigned queries = shared_address(shared), keys = queries + kRows * kDim * 2,
                   values = keys + 2 * kTileBytes;
    wait_for_previous();
    const int num_heads = gridDim.x, head = blockIdx.x, request = blockIdx.z;
    const prefill::Chunk chunk = prefill::chunk_of(cu_seqlens, seq_lens, request);
    // Late queries see the most and begin first.
    const int tile_of_queries = (chunk.count + kRows - 1) / kRows - 1 - static_cast<int>(blockIdx.y);
    if (tile_of_queries < 0) return;
    const int first = tile_of_queries * kRows, num_rows = min(kRows, chunk.count - first);
    const int position = chunk.length - chunk.count + first;
    const long long row = (static_cast<long long>(chunk.begin + first) * num_heads + head) * kDim;
    const int kv_offset = head / (num_heads / num_kv_heads) * kDim;
    Gather<T, kDim> gather{k_cache + kv_offset,   v_cache + kv_offset, block_tables + request * table_stride,
                           block_size,            chunk.length,        num_kv_heads * kDim,
                           {}};
    const int lowest = prefill::first_key(position, window) / kKeys;
    const int first_row = chunk.begin + first, end_row = first_row + num_rows;
    int tile = prefill::last_key<kSpans>(visible_ends, end_row - 1, position + num_rows - 1) / kKeys;
    copy_queries<T, kDim>(queries, query + row, num_heads * kDim, num_rows);
    gather.look_up(tile);
    gather.copy(tile, keys, values);
    if (tile > lowest) gather.look_up(tile - 1);

    const prefill::Scaling scaling = prefill::scaling_of(scale, softcap);
    const int lane = threadIdx.x % 32, own_row = threadIdx.x / 32 * 16, own_position = position + own_row;
    prefill::Rows rows;
    float outputs[kDim / 2] = {};
    for (int stage = 0; tile >= lowest; --tile, stage ^= 1) {
        prefill::wait_for_copies();
        __syncthreads();
        if (tile > lowest) {
            gather.copy(tile - 1, keys + (stage ^ 1) * kTileBytes, values + (stage ^ 1) * kTileBytes);
            if (tile - 1 > lowest) gather.look_up(tile - 2);
        }
        float scores[kKeys / 2], shift[2], corrections[2];
        query_times_keys<T, kDim>(scores, queries, keys + stage * kTileBytes);
        if (scaling.inner != 0.0f) prefill::cap(scores, scaling.inner);
        const bool hides = tile * kKeys + kKeys - 1 > own_position ||
                           (window && tile * kKeys <= own_position + 15 - window);
        if (hides)
            prefill::mask<kSpans>(
                scores, own_position + lane / 4, tile * kKeys + lane % 4 * 2, window, visible_ends,
                first_row + own_row + lane / 4, end_row);
        prefill::find_largest<0>(scores, rows, scaling.factor, shift, corrections);
        prefill::scale_rows(outputs, corrections);
        unsigned weights[kKeys / 4];
        prefill::exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
        add_weighted_values<T, kDim>(outputs, weights, values + stage * kTileBytes);
    }
    let_next_begin();
    float inverse[2];
    prefill::reciprocals(rows, inverse);
    prefill::scale_rows(outputs, inverse);
    __syncwarp();
    store_rows<T, kDim>(outputs, shared, queries, out + row, num_heads * kDim, num_rows);
}

}  // namespace

#define KERNEL(NAME, T, DIM, SPANS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) paged_prefill_attention_mma_##NAME(                     \
        const T* query, const T* k_cache, const T* v_cache, const int* block_tables, const int* cu_seqlens,           \
        const int* seq_lens, T* out, int num_kv_heads, int block_size, long long table_stride, float scale,           \
        int window, float softcap, const int* visible_ends) {                                                         \
        attend<T, DIM, SPANS>(                                                                                        \
            query, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, out, num_kv_heads, block_size, table_stride, \
            scale, window, softcap, visible_ends);                                                                    \
    }
#define KERNELS(NAME, T)                      \
    KERNEL(NAME##_64, T, 64, false)           \
    KERNEL(NAME##_64_spans, T, 64, true)      \
    KERNEL(NAME##_128, T, 128, false)         \
    KERNEL(NAME##_128_spans, T, 128, true)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
