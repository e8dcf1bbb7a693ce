// Queries and keys turned, keys and values stored to their slots, queries to a tensor of their own: one pass over qkv.
#include "dependent.cuh"
#include "last_first.cuh"
#include "packs.cuh"

namespace {

// blockIdx.x counts tokens, from the last. Thread t has pack t % packs of the halves of kHeads heads, which lie blockDim.x / packs
// apart; blockIdx.y counts further heads where one block does not have all. Values are copied, two packs as well.
template <typename T, int kCount, int kHeads>
__device__ __forceinline__ void rotary_write_kv(
    const T* __restrict__ qkv, const long long* __restrict__ positions, const T* __restrict__ cos_sin,
    T* __restrict__ k_cache, T* __restrict__ v_cache, const long long* __restrict__ slot_mapping,
    T* __restrict__ query, int num_heads, int num_kv_heads, int head_dim) {
    let_next_begin();
    const long long token = last_first();
    const int half = head_dim / 2, packs = half / kCount, turning = num_heads + num_kv_heads;
    const int all_heads = turning + num_kv_heads, heads_apart = blockDim.x / packs;
    const int at = threadIdx.x % packs * kCount;
    const int first_head = blockIdx.y * kHeads * heads_apart + threadIdx.x / packs;
    const T* source = qkv + token * all_heads * head_dim + at;
    wait_for_previous();
    const long long position = positions[token], slot = slot_mapping[token];
    Pack<T, kCount> first[kHeads], second[kHeads];
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
        const int head = first_head + k * heads_apart;
        if (head >= all_heads) continue;
        first[k] = load<T, kCount>(source + head * head_dim);
        second[k] = load<T, kCount>(source + head * head_dim + half);
    }
    const Pack<T, kCount> cos = load<T, kCount>(cos_sin + position * head_dim + at);
    const Pack<T, kCount> sin = load<T, kCount>(cos_sin + position * head_dim + half + at);
    const Floats<kCount> x = floats_of(cos), y = floats_of(sin);
#pragma unroll
    for (int k = 0; k < kHeads; ++k) {
        const int head = first_head + k * heads_apart;
        if (head >= all_heads) continue;
        T* to;
        if (head < num_heads) {
            to = query + (token * num_heads + head) * head_dim + at;
        } else {
            if (slot < 0) continue;
            to = head < turning ? k_cache + (slot * num_kv_heads + head - num_heads) * head_dim + at
                                : v_cache + (slot * num_kv_heads + head - turning) * head_dim + at;
        }
        if (head < turning) {
            const Floats<kCount> a = floats_of(first[k]), b = floats_of(second[k]);
            Floats<kCount> one, other;
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                one.elements[e] = a.elements[e] * x.elements[e] - b.elements[e] * y.elements[e];
                other.elements[e] = b.elements[e] * x.elements[e] + a.elements[e] * y.elements[e];
            }
            first[k] = pack_of<T>(one), second[k] = pack_of<T>(other);
        }
        store<T, kCount>(to, first[k]);
        store<T, kCount>(to + half, second[k]);
    }
}

}  // namespace

#define KERNEL(NAME, T, KIND, COUNT, HEADS)                                                                          \
    extern "C" __global__ void __launch_bounds__(512) rotary_write_kv_##NAME##_##KIND##_##HEADS(                    \
        const T* qkv, const long long* positions, const T* cos_sin, T* k_cache, T* v_cache,                          \
        const long long* slot_mapping, T* query, int num_heads, int num_kv_heads, int head_dim) {                    \
        rotary_write_kv<T, COUNT, HEADS>(                                                                            \
            qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, query, num_heads, num_kv_heads, head_dim);      \
    }
#define KERNELS(NAME, T)                   \
    KERNEL(NAME, T, wide, kWide<T>, 1)     \
    KERNEL(NAME, T, wide, kWide<T>, 2)     \
    KERNEL(NAME, T, single, 1, 1)          \
    KERNEL(NAME, T, single, 1, 2)
FOR_EACH_DTYPE(KERNELS)
