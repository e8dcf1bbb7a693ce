// Attention of one query per request over the paged KV cache: a general kernel, and one that streams 16-bit caches.
#include "paged_decode_attention_stream.cuh"

namespace {

// Any dtype, block size and head up to 32 * kMaxParts wide: a block of kGeneralWarps warps per request and query head,
// whose warps take turns at kAtOnce tokens each.
constexpr int kMaxParts = 8, kGeneralWarps = 8, kAtOnce = 4;

template <typename T>
__device__ __forceinline__ void attend_head(const Inputs<T>& in, int head_dim, int block_size) {
    __shared__ float parts[kGeneralWarps][32 * kMaxParts], maxima[kGeneralWarps], sums[kGeneralWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, request = blockIdx.x, head = blockIdx.y;
    const int length = in.lengths[request], kv_head = head / in.group;
    const int start = in.window > 0 && length > in.window ? length - in.window : 0;
    const int* table = in.block_tables + static_cast<long long>(request) * in.table_stride;
    const long long row_size = static_cast<long long>(in.num_kv_heads) * head_dim;
    const long long at = (static_cast<long long>(request) * in.num_heads() + head) * head_dim;
    float query[kMaxParts], sum_of_values[kMaxParts] = {}, maximum = lowest(), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxParts; ++i)
        query[i] = lane + 32 * i < head_dim ? to_float(in.query[at + lane + 32 * i]) : 0.0f;
    for (int first = start + warp * kAtOnce; first < length; first += kGeneralWarps * kAtOnce) {
        float scores[kAtOnce];
        long long rows[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int token = min(first + j, length - 1);
            rows[j] = (static_cast<long long>(table[token / block_size]) * block_size + token % block_size) * row_size +
                      kv_head * head_dim;
            scores[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < kMaxParts; ++i)
                if (lane + 32 * i < head_dim) scores[j] += query[i] * to_float(in.keys[rows[j] + lane + 32 * i]);
        }
        float new_maximum = maximum;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            for (int offset = 16; offset; offset /= 2) scores[j] += __shfl_xor_sync(0xffffffffu, scores[j], offset);
            scores[j] *= in.scale;
            if (in.softcap > 0.0f) scores[j] = in.softcap * tanhf(scores[j]);
            if (first + j >= length) scores[j] = lowest();
            new_maximum = fmaxf(new_maximum, scores[j]);
        }
        const float kept = exp2f(maximum - new_maximum);
        maximum = new_maximum;
        sum *= kept;
#pragma unroll
        for (int i = 0; i < kMaxParts; ++i) sum_of_values[i] *= kept;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const float p = exp2f(scores[j] - maximum);
            sum += p;
#pragma unroll
            for (int i = 0; i < kMaxParts; ++i)
                if (lane + 32 * i < head_dim) sum_of_values[i] += p * to_float(in.values[rows[j] + lane + 32 * i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kMaxParts; ++i) parts[warp][lane + 32 * i] = sum_of_values[i];
    if (lane == 0) maxima[warp] = maximum, sums[warp] = sum;
    __syncthreads();
    float highest = lowest(), total = 0.0f;
    for (int w = 0; w < kGeneralWarps; ++w) highest = fmaxf(highest, maxima[w]);
    for (int w = 0; w < kGeneralWarps; ++w) total += length > 0 ? sums[w] * exp2f(maxima[w] - highest) : 0.0f;
    for (int dim = threadIdx.x; dim < head_dim; dim += blockDim.x) {
        float value = 0.0f;
        for (int w = 0; w < kGeneralWarps; ++w)
            value += length > 0 ? parts[w][dim] * exp2f(maxima[w] - highest) : 0.0f;
        in.out[at + dim] = from_float<T>(length > 0 ? value / total : 0.0f);
    }
}

}  // namespace

#define GENERAL(NAME, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * kGeneralWarps) paged_decode_attention_##NAME(                  \
        const T* query, const T* keys, const T* values, const int* block_tables, const int* lengths, T* out,         \
        int num_heads, int num_kv_heads, int head_dim, int block_size, int table_stride, float scale, float softcap, \
        int window) {                                                                                                \
        let_next_begin();                                                                                            \
        wait_for_previous();                                                                                         \
        attend_head<T>({query, keys, values, block_tables, lengths, out, nullptr, 0, num_kv_heads,                   \
                        num_heads / num_kv_heads, 0, 0, table_stride, scale, softcap, window},                 \
                       head_dim, block_size);                                                                        \
    }
FOR_EACH_DTYPE(GENERAL)


#define STREAMING(NAME, T, DIM, WARPS, STAGES)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 2)                                                \
        paged_decode_attention_##NAME##_##DIM##_##WARPS##_##STAGES(                                                  \
            const T* query, const T* keys, const T* values, const int* block_tables, const int* lengths, T* out,     \
            float* partials, int batch, int num_kv_heads, int group, int passes, int block_shift, int table_stride,  \
            float scale, float softcap, int window) {                                                                \
        stream<T, DIM, WARPS, STAGES>({query, keys, values, block_tables, lengths, out, partials, batch,             \
                                       num_kv_heads, group, passes, block_shift, table_stride, scale, softcap,       \
                                       window});                                                                     \
    }
#define DIMS(NAME, T)             \
    STREAMING(NAME, T, 64, 4, 2)  \
    STREAMING(NAME, T, 64, 4, 3)  \
    STREAMING(NAME, T, 128, 4, 2) \
    STREAMING(NAME, T, 128, 4, 3)
DIMS(float16, float16)
DIMS(bfloat16, bfloat16)
