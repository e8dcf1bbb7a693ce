// Queries and keys turned, keys and values stored to their slots, queries to a tensor of their own: one pass over qkv.
#include "numbers.cuh"

namespace {

// A token per blockIdx.x; its threads walk over (head, pack) of half a head each. Values have no other half to turn
// with, so their threads copy two packs.
template <typename T, int kCount>
__device__ __forceinline__ void rotary_write_kv(
    const T* __restrict__ qkv, const T* __restrict__ cos, const T* __restrict__ sin, T* __restrict__ k_cache,
    T* __restrict__ v_cache, const long long* __restrict__ slot_mapping, T* __restrict__ query, int num_heads,
    int num_kv_heads, int head_dim) {
    const long long token = blockIdx.x;
    const int half = head_dim / 2, packs = half / kCount, all_heads = num_heads + 2 * num_kv_heads;
    const long long slot = slot_mapping[token];
    const T* source = qkv + token * all_heads * head_dim;
    for (int i = threadIdx.x; i < all_heads * packs; i += blockDim.x) {
        const int head = i / packs, at = (i - head * packs) * kCount;
        const T* from = source + head * head_dim + at;
        Pack<T, kCount> first = load<T, kCount>(from), second = load<T, kCount>(from + half);
        T* to;
        if (head < num_heads) {
            to = query + (token * num_heads + head) * head_dim;
        } else if (head < num_heads + num_kv_heads) {
            to = k_cache + (slot * num_kv_heads + head - num_heads) * head_dim;
        } else {
            to = v_cache + (slot * num_kv_heads + head - num_heads - num_kv_heads) * head_dim;
        }
        if (head < num_heads + num_kv_heads) {
            // Both halves of a row of cos and sin are alike.
            const Pack<T, kCount> c = load<T, kCount>(cos + token * head_dim + at);
            const Pack<T, kCount> s = load<T, kCount>(sin + token * head_dim + at);
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                const float a = to_float(first.elements[e]), b = to_float(second.elements[e]);
                const float x = to_float(c.elements[e]), y = to_float(s.elements[e]);
                first.elements[e] = from_float<T>(a * x - b * y);
                second.elements[e] = from_float<T>(b * x + a * y);
            }
        }
        store<T, kCount>(to + at, first);
        store<T, kCount>(to + at + half, second);
    }
}

}  // namespace

#define KERNEL(NAME, T, KIND, COUNT)                                                                                 \
    extern "C" __global__ void rotary_write_kv_##NAME##_##KIND(                                                      \
        const T* qkv, const T* cos, const T* sin, T* k_cache, T* v_cache, const long long* slot_mapping, T* query,   \
        int num_heads, int num_kv_heads, int head_dim) {                                                             \
        rotary_write_kv<T, COUNT>(                                                                                   \
            qkv, cos, sin, k_cache, v_cache, slot_mapping, query, num_heads, num_kv_heads, head_dim);                \
    }
#define KERNELS(NAME, T)                \
    KERNEL(NAME, T, wide, kWide<T>)     \
    KERNEL(NAME, T, single, 1)
FOR_EACH_DTYPE(KERNELS)
