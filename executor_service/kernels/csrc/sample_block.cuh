// What a block of threads works out together about one row of logits: reductions, prefix sums, and which element of an
// order a sum reaches. Sums are of integers, so they do not depend on who adds first.
#pragma once

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = 2 * kThreads, kMaxListed = 512;
// Tokens that a warp reads at once, 4 per lane; a row has at most kBins such groups.
constexpr int kGroup = 128;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNoToken = 0x7fffffff;

using uint64 = unsigned long long;

// Histogram or amounts per group, in two words; tokens listed by value; results of the functions below.
struct Shared {
    unsigned low[kBins], high[kBins];
    float listed_values[kMaxListed];
    int listed_ids[kMaxListed];
    uint64 parts[kWarps];
    uint64 left, amount;
    int place, num_listed;
};

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

// A token and its value; kNoToken where there is none.
struct Best {
    float value;
    int id;

    __device__ __forceinline__ void consider(float other, int other_id) {
        if (other > value) value = other, id = other_id;
    }
};

__device__ __forceinline__ uint64 best_of_warp(uint64 packed) {
    const unsigned high = __reduce_max_sync(kAllLanes, static_cast<unsigned>(packed >> 32));
    const unsigned mine = packed >> 32 == high ? static_cast<unsigned>(packed) : 0u;
    return static_cast<uint64>(high) << 32 | __reduce_max_sync(kAllLanes, mine);
}

// The largest value, the lowest id among equals.
__device__ __forceinline__ Best best_of_block(Best best, Shared& shared) {
    const uint64 packed = best_of_warp(static_cast<uint64>(key_of(best.value)) << 32 | ~static_cast<unsigned>(best.id));
    if (lane_of() == 0) shared.parts[warp_of()] = packed;
    __syncthreads();
    const uint64 whole = best_of_warp(shared.parts[lane_of()]);
    __syncthreads();
    return {value_of(static_cast<unsigned>(whole >> 32)), static_cast<int>(~static_cast<unsigned>(whole))};
}

__device__ __forceinline__ unsigned min_of_block(unsigned value, Shared& shared) {
    value = __reduce_min_sync(kAllLanes, value);
    if (lane_of() == 0) shared.parts[warp_of()] = value;
    __syncthreads();
    value = __reduce_min_sync(kAllLanes, static_cast<unsigned>(shared.parts[lane_of()]));
    __syncthreads();
    return value;
}

// In an order of additions that depends on the number of threads alone.
__device__ __forceinline__ double sum_of_block(double value, Shared& shared) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    if (lane_of() == 0) shared.parts[warp_of()] = __double_as_longlong(value);
    __syncthreads();
    value = __longlong_as_double(shared.parts[lane_of()]);
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    __syncthreads();
    return value;
}

__device__ __forceinline__ uint64 sum_of_warp(uint64 value) {
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

// Sum of this lane's and all earlier ones.
__device__ __forceinline__ uint64 sum_up_to_lane(uint64 value) {
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64 earlier = __shfl_up_sync(kAllLanes, value, offset);
        if (lane_of() >= offset) value += earlier;
    }
    return value;
}

// Sum of all earlier threads' amounts; `total` of all.
__device__ __forceinline__ uint64 sum_before(uint64 amount, uint64& total, Shared& shared) {
    const uint64 up_to = sum_up_to_lane(amount);
    if (lane_of() == 31) shared.parts[warp_of()] = up_to;
    __syncthreads();
    const uint64 part = shared.parts[lane_of()], parts = sum_up_to_lane(part);
    total = __shfl_sync(kAllLanes, parts, 31);
    const uint64 earlier_warps = __shfl_sync(kAllLanes, parts - part, warp_of());
    __syncthreads();
    return earlier_warps + up_to - amount;
}

// Two amounts per thread, in the threads' order: says in `shared` at which place their sum first reaches `target`,
// which is 1 to their total, what is `left` of the target there, and the `amount` there. `before` is `sum_before`.
__device__ __forceinline__ void locate(uint64 before, uint64 first, uint64 second, uint64 target, Shared& shared) {
    if (before < target && target <= before + first + second) {
        const bool is_second = target > before + first;
        shared.place = 2 * threadIdx.x + is_second;
        shared.left = target - before - (is_second ? first : 0);
        shared.amount = is_second ? second : first;
    }
    __syncthreads();
}

__device__ __forceinline__ uint64 amount_at(int place, const Shared& shared) {
    return static_cast<uint64>(shared.high[place]) << 32 | shared.low[place];
}

// Shared memory adds 32 bits at a time; the carry goes up by itself.
__device__ __forceinline__ void add_amount(int place, uint64 amount, Shared& shared) {
    const unsigned low = static_cast<unsigned>(amount);
    const unsigned before = atomicAdd(&shared.low[place], low);
    const unsigned high = static_cast<unsigned>(amount >> 32) + (before + low < low);
    if (high) atomicAdd(&shared.high[place], high);
}

__device__ __forceinline__ void clear_amounts(Shared& shared) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.low[i] = shared.high[i] = 0;
    __syncthreads();
}
