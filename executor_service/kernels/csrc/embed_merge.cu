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
// `first_item` on, and with first_item = 0 also those that have none. Places are read before the kernel before has
// ended, so it is not the one that writes them; features and ids may be its work.
template <typename Access, int kInFlight>
__device__ __forceinline__ void embed_merge(
    const long long* __restrict__ token_ids, const int* __restrict__ places, const Access* __restrict__ table,
    const FeatureRows& features, int first_item, Access* __restrict__ out, int length) {
    const long long token = blockIdx.x;
    const int place = places[2 * token], item = place - first_item;
    const bool is_ours = place < 0 ? first_item == 0 : item >= 0 && item < kMaxItems;
    const Access* from = nullptr;
    if (is_ours && place >= 0)
        from = static_cast<const Access*>(features.of[item]) + static_cast<long long>(places[2 * token + 1]) * length;
    if (is_ours && threadIdx.x == 0) {
        if (from == nullptr) {
            bring_near(token_ids + token);
        } else if (sizeof(Access) == 16) {
            bring_near(from, length * 16);
        }
    }
    wait_for_previous();
    let_next_begin();  // not before: its rows would be brought near while this one's are copied
    if (!is_ours) return;
    if (from == nullptr) from = table + token_ids[token] * length;
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
        const long long* token_ids, const int* places, const ACCESS* table,                                      \
        const __grid_constant__ FeatureRows features, int first_item, ACCESS* out, int length) {                 \
        embed_merge<ACCESS, IN_FLIGHT>(token_ids, places, table, features, first_item, out, length);             \
    }
KERNEL(16, uint4, 1)
KERNEL(16, uint4, 4)
KERNEL(4, unsigned, 4)
KERNEL(2, unsigned short, 4)
