// Rows of keys and values to their slots: copies of bytes, whatever the elements are.
#include "dependent.cuh"

namespace {

// blockIdx.x is the token, whose row has `length` accesses.
template <typename Access>
__device__ __forceinline__ void write_kv(
    const Access* __restrict__ key, const Access* __restrict__ value, Access* __restrict__ k_cache,
    Access* __restrict__ v_cache, const long long* __restrict__ slot_mapping, int length) {
    let_next_begin();
    wait_for_previous();
    const long long from = static_cast<long long>(blockIdx.x) * length, slot = slot_mapping[blockIdx.x];
    if (slot < 0) return;
    for (int i = threadIdx.x; i < length; i += blockDim.x) {
        const Access one = key[from + i], other = value[from + i];
        k_cache[slot * length + i] = one;
        v_cache[slot * length + i] = other;
    }
}

}  // namespace

#define KERNEL(BYTES, ACCESS)                                                                                    \
    extern "C" __global__ void write_kv_##BYTES(                                                                 \
        const ACCESS* key, const ACCESS* value, ACCESS* k_cache, ACCESS* v_cache, const long long* slot_mapping, \
        int length) {                                                                                            \
        write_kv<ACCESS>(key, value, k_cache, v_cache, slot_mapping, length);                                    \
    }
KERNEL(16, uint4)
KERNEL(4, unsigned)
KERNEL(2, unsigned short)
