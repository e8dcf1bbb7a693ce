// What a block of threads works out together about one row of logits: reductions, prefix sums, and which element of an
// order a sum reaches. Sums are of integers, so they do not depend on who adds first.
#pragma once

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = 2 * kThreads, kMaxListed = 512;
// Tokens that a warp reads at once, 4 per lane.
constexpr int kGroup = 128;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNoToken = 0x7fffffff;

using uint64 = unsigned long long;

// Histogram or amounts per group, in two words; listed tokens, as numbers that order as they do, and their amounts;
// results of the functions below.
struct Shared {
    unsigned low[kBins], high[kBins], rest[32];
    uint64 listed[kMaxListed], listed_amounts[kMaxListed];
    uint64 parts[kWarps];
    uint64 left, amount;
    int place, num_listed;
};

__shared__ Shared shared;

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// A number that orders as the value does. There is no -0 among the values.
__device__ __forceinline__ unsigned key_of(float value) {
    const unsigned bits = __float_as_uint(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// One number for a token in the order of falling values and rising ids: the best has the largest.
__device__ __forceinline__ uint64 order_of(float value, int id) {
    return static_cast<uint64>(key_of(value)) << 32 | ~static_cast<unsigned>(id);
}

// A token and its value; kNoToken where there is none.
struct Best {
    float value;
    int id;

    __device__ __forceinline__ void consider(float other, int other_id) {
        if (other > value) value = other, id = other_id;
    }
};

__device__ __forceinline__ Best best_in(uint64 order) {
    return {value_of(static_cast<unsigned>(order >> 32)), static_cast<int>(~static_cast<unsigned>(order))};
}

__device__ __forceinline__ uint64 best_of_warp(uint64 packed) {
    const unsigned high = __reduce_max_sync(kAllLanes, static_cast<unsigned>(packed >> 32));
    const unsigned mine = packed >> 32 == high ? static_cast<unsigned>(packed) : 0u;
    return static_cast<uint64>(high) << 32 | __reduce_max_sync(kAllLanes, mine);
}

// The largest value, the lowest id among equals.
__device__ __forceinline__ Best best_of_block(Best best) {
    const uint64 packed = best_of_warp(order_of(best.value, best.id));
    if (lane_of() == 0) shared.parts[warp_of()] = packed;
    __syncthreads();
    const uint64 whole = best_of_warp(shared.parts[lane_of()]);
    __syncthreads();
    return best_in(whole);
}

// In an order of additions that depends on the number of threads alone.
__device__ __forceinline__ double sum_of_block(double value) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    if (lane_of() == 0) shared.parts[warp_of()] = __double_as_longlong(value);
    __syncthreads();
    value = __longlong_as_double(shared.parts[lane_of()]);
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    __syncthreads();
    return value;
}

// Of amounts below 2^48, in two parts whose sums fit in 32 bits.
__device__ __forceinline__ uint64 sum_of_warp(uint64 value) {
    const unsigned low = static_cast<unsigned>(value) & 0xffffffu, high = static_cast<unsigned>(value >> 24);
    return (static_cast<uint64>(__reduce_add_sync(kAllLanes, high)) << 24) + __reduce_add_sync(kAllLanes, low);
}

// Sum of this lane's and all earlier ones.
__device__ __forceinline__ uint64 sum_up_to_lane(uint64 value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64 earlier = __shfl_up_sync(kAllLanes, value, offset);
        if (lane_of() >= offset) value += earlier;
    }
    return value;
}

// Sums of amounts: of what comes before one's own, and of all.
struct Sums {
    uint64 before, total;
};

// Of all threads' amounts, in the threads' order.
__device__ __noinline__ Sums sum_before(uint64 amount) {
    const uint64 up_to = sum_up_to_lane(amount);
    if (lane_of() == 31) shared.parts[warp_of()] = up_to;
    __syncthreads();
    const uint64 part = shared.parts[lane_of()], parts = sum_up_to_lane(part);
    const uint64 total = __shfl_sync(kAllLanes, parts, 31);
    const uint64 earlier_warps = __shfl_sync(kAllLanes, parts - part, warp_of());
    __syncthreads();
    return {earlier_warps + up_to - amount, total};
}

// Two amounts per thread, in the threads' order: says in `shared` at which place their sum first reaches `target`,
// which is 1 to their total, what is `left` of the target there, and the `amount` there. `before` is `sum_before`.
__device__ __forceinline__ void locate(uint64 before, uint64 first, uint64 second, uint64 target) {
    if (before < target && target <= before + first + second) {
        const bool is_second = target > before + first;
        shared.place = 2 * threadIdx.x + is_second;
        shared.left = target - before - (is_second ? first : 0);
        shared.amount = is_second ? second : first;
    }
    __syncthreads();
}

__device__ __forceinline__ uint64 amount_at(int place) {
    return static_cast<uint64>(shared.high[place]) << 32 | shared.low[place];
}

// Where a variable is in shared memory. It is worked out once: the compiler would do it again in every branch.
__device__ __forceinline__ unsigned address_in_shared(const void* variable) {
    unsigned address;
    asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"(static_cast<unsigned>(__cvta_generic_to_shared(variable))));
    return address;
}

// Adds and returns what was there before.
__device__ __forceinline__ unsigned add_at(unsigned address, unsigned amount) {
    unsigned before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(address), "r"(amount) : "memory");
    return before;
}

// The amounts of the histogram: shared memory adds 32 bits at a time, so what the first addition, whose result is
// `before`, carries over is to be added to the high word.
struct Amounts {
    unsigned low;

    __device__ __forceinline__ Amounts() : low(address_in_shared(shared.low)) {}

    __device__ __forceinline__ static unsigned carried(uint64 amount, unsigned before) {
        return static_cast<unsigned>((amount + before) >> 32);
    }
    __device__ __forceinline__ void add_high(unsigned address, unsigned amount) const {
        if (amount) add_at(address + static_cast<unsigned>(sizeof shared.low), amount);
    }
};

__device__ __forceinline__ void clear_amounts() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.low[i] = shared.high[i] = 0;
    if (threadIdx.x < 32) shared.rest[threadIdx.x] = 0;
    __syncthreads();
}

// --- the list -----------------------------------------------------------------------------------------

__device__ __forceinline__ void begin_list() {
    if (threadIdx.x == 0) shared.num_listed = 0;
    __syncthreads();
}

// Tokens beyond kMaxListed are counted, but not kept.
__device__ __forceinline__ void add_to_list(float value, int id, uint64 amount) {
    const int place = atomicAdd(&shared.num_listed, 1);
    if (place < kMaxListed) shared.listed[place] = order_of(value, id), shared.listed_amounts[place] = amount;
}

// The place in the list that this thread is to answer for, or -1, and the sums of amounts there.
struct Compared {
    int place;
    Sums sums;
};

constexpr uint64 kByOrder = ~uint64{0}, kById = 0xffffffffu;

// Compares every listed token with all others, from the best to the worst or from the first to the last (`kById`).
__device__ __noinline__ Compared compare_listed(int num_listed, uint64 part) {
    int lanes = 32;  // that share a token
    while (lanes > 1 && kThreads / lanes < num_listed) lanes /= 2;
    const int place = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const uint64 mine = place < num_listed ? shared.listed[place] & part : 0;
    Sums sums = {0, 0};
    for (int i = lane; i < num_listed; i += lanes) {
        const uint64 amount = shared.listed_amounts[i];
        sums.total += amount;
        if ((shared.listed[i] & part) > mine) sums.before += amount;
    }
    for (int offset = lanes / 2; offset; offset /= 2) {
        sums.before += __shfl_xor_sync(kAllLanes, sums.before, offset);
        sums.total += __shfl_xor_sync(kAllLanes, sums.total, offset);
    }
    return {place < num_listed && lane == 0 ? place : -1, sums};
}
