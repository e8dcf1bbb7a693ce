// Token embeddings and encoder features gathered into one tensor: copies of rows, whatever the elements are.
#include "dependent.cuh"
#include "early.cuh"

namespace {

constexpr int kMaxItems = 64;

}  // namespace

struct FeatureRows {
    const void* of[kMaxItems];
};

namespace {

// blockIdx.x is the token; its row has `length` accesses. Writes the tokens whose item is one of the kMaxItems from
// `first_item` on, and with first_item = 0 also those that have none.
template <typename Access, int kInFlight>
__device__ __forceinline__ void embed_merge(
    const long long* __restrict__ token_ids, const int2* __restrict__ places, const Access* __restrict__ table,
    const FeatureRows& features, int first_item, Access* __restrict__ out, int length) {
    let_next_begin();
    const long long token = blockIdx.x;
    if (threadIdx.x == 0) bring_near(places + token), bring_near(token_ids + token);
    wait_for_previous();
    const int2 place = places[token];
    // Loaded without waiting for the place, whether it is needed or not.
    const long long id = token_ids[token];
    const Access* from;
    if (place.x < 0) {
        if (first_item > 0) return;
        from = table + id * length;
    } else {
        const int item = place.x - first_item;
        if (item < 0 || item >= kMaxItems) return;
        from = static_cast<const Access*>(features.of[item]) + static_cast<long long>(place.y) * length;
    }
    Access* to = out + token * length;
    for (int first = threadIdx.x; first < length; first += kInFlight * blockDim.x) {
        Access packs[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (first + k * blockDim.x < length) packs[k] = from[first + k * blockDim.x];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k)
            if (first + k * blockDim.x < length) to[first + k * blockDim.x] = packs[k];
    }
}

}  // namespace

#define KERNEL(BYTES, ACCESS, IN_FLIGHT)                                                                         \
    extern "C" __global__ void __launch_bounds__(512) embed_merge_##BYTES##_##IN_FLIGHT(                         \
        const long long* token_ids, const int2* places, const ACCESS* table,                                     \
        const __grid_constant__ FeatureRows features, int first_item, ACCESS* out, int length) {                 \
        embed_merge<ACCESS, IN_FLIGHT>(token_ids, places, table, features, first_item, out, length);             \
    }
KERNEL(16, uint4, 1)
KERNEL(16, uint4, 4)
KERNEL(4, unsigned, 4)
KERNEL(2, unsigned short, 4)
