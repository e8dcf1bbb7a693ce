// Prefill attention for every dtype, head size and block size: one warp per query and head, one key per lane.
#include "dependent.cuh"
#include "paged_prefill_attention.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kSlices = 4;  // 32 output elements each: what a warp keeps in registers during one pass over the keys

template <typename T>
__device__ __forceinline__ void attend(
    const T* __restrict__ query, const T* __restrict__ k_cache, const T* __restrict__ v_cache,
    const int* __restrict__ table, int begin, int end, int num_kv_heads, int kv_head, int head_dim, int block_size,
    float scale, float softcap, T* __restrict__ out) {
    const int lane = threadIdx.x % 32;
    for (int slice = 0; slice < head_dim; slice += 32 * kSlices) {
        float maximum = prefill::minus_infinity(), sum = 0.0f, outputs[kSlices] = {};
        for (int first = begin; first < end; first += 32) {
            const int key = first + lane;
            float score = prefill::minus_infinity();
            long long row = 0;
            if (key < end) {
                const long long slot = static_cast<long long>(table[key / block_size]) * block_size + key % block_size;
                row = (slot * num_kv_heads + kv_head) * head_dim;
                float product = 0.0f;
                for (int d = 0; d < head_dim; ++d) product += to_float(query[d]) * to_float(k_cache[row + d]);
                score = softcap == 0.0f ? product * scale : softcap * tanhf(product * scale / softcap);
            }
            float largest = score;
            for (int offset = 16; offset; offset /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(prefill::kAllLanes, largest, offset));
            largest = fmaxf(largest, maximum);
            const float correction = expf(maximum - largest), weight = expf(score - largest);
            maximum = largest;
            sum = sum * correction + weight;
            for (float& value : outputs) value *= correction;
            for (int other = 0; other < min(32, end - first); ++other) {
                const float other_weight = __shfl_sync(prefill::kAllLanes, weight, other);
                const T* values = v_cache + __shfl_sync(prefill::kAllLanes, row, other);
#pragma unroll
                for (int i = 0; i < kSlices; ++i) {
                    const int d = slice + 32 * i + lane;
                    if (d < head_dim) outputs[i] += other_weight * to_float(values[d]);
                }
            }
        }
        for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(prefill::kAllLanes, sum, offset);
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
            const int d = slice + 32 * i + lane;
            if (d < head_dim) out[d] = from_float<T>(outputs[i] / sum);
        }
    }
}

}  // namespace

// Grid (queries of the longest chunk / kWarps, heads, requests).
#define KERNEL(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(32 * kWarps) paged_prefill_attention_##NAME(                         \
        const T* query, const T* k_cache, const T* v_cache, const int* block_tables, const int* cu_seqlens,           \
        const int* seq_lens, T* out, int num_kv_heads, int head_dim, int block_size, long long table_stride,          \
        float scale, int window, float softcap, const int* visible_ends) {                                            \
        wait_for_previous();                                                                                          \
        const int request = blockIdx.z, head = blockIdx.y, num_heads = gridDim.y;                                     \
        const prefill::Chunk chunk = prefill::chunk_of(cu_seqlens, seq_lens, request);                                \
        /* The late queries see the most and begin first. */                                                          \
        const int index = chunk.count - 1 - static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);                 \
        if (index < 0) return;                                                                                        \
        const long long row = (static_cast<long long>(chunk.begin + index) * num_heads + head) * head_dim;            \
        const int position = chunk.length - chunk.count + index;                                                      \
        attend<T>(                                                                                                    \
            query + row, k_cache, v_cache, block_tables + request * table_stride,                                     \
            prefill::first_key(position, window), visible_ends ? visible_ends[chunk.begin + index] : position + 1,    \
            num_kv_heads, head / (num_heads / num_kv_heads), head_dim, block_size, scale, softcap, out + row);        \
    }
FOR_EACH_DTYPE(KERNEL)
