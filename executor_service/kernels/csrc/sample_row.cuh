// A row of values of which some are kept: passes over it, thresholds, and draws.
#pragma once
#include "sample_block.cuh"

constexpr float kOne = 68719476736.0f;  // a probability of 1, before normalisation: 2^36
constexpr float kToInteger = 8388608.0f;  // 2^23: the last bits of its sum with a smaller float are the nearest integer
// Up to so many of the best tokens are found among those that are no less than so many threads' best.
constexpr int kMaxBestOfThreads = 128;
constexpr float kBinsPerHalving = 100.0f;  // of the probability; kBins of them reach down to 2^-20 of the largest

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

extern __shared__ float4 row_in_shared[];

// Where the row is kept. The steps that follow are functions of their own, which all types of logits have in common.
template <bool kInShared> __device__ __forceinline__ float* values_of(float* lent) {
    return kInShared ? reinterpret_cast<float*>(row_in_shared) : lent;
}

// The last token that is kept, in the order of falling values and rising ids.
struct Cut {
    float value;
    int id;

    __device__ __forceinline__ float above() const { return value_of(key_of(value) + 1); }
};

__device__ __forceinline__ Cut everything() { return {-infinity(), kNoToken}; }

// Four values of which those that the cut keeps are no less than `least`.
struct Four {
    float values[4], least;

    __device__ __forceinline__ Four(const float* row, int at, Cut cut, float above) {
        const float4 pack = *reinterpret_cast<const float4*>(row + at);
        values[0] = pack.x, values[1] = pack.y, values[2] = pack.z, values[3] = pack.w;
        least = at <= cut.id ? cut.value : above;
        if (at <= cut.id && cut.id < at + 3) {
            for (int e = 1; e < 4; ++e)
                if (at + e > cut.id && values[e] == cut.value) values[e] = -infinity();
        }
    }
};

// Every thread has the same elements in every pass; in token order they are 4 of each group of kGroup.
template <typename Visit>
__device__ __forceinline__ void for_each_four(const float* values, int width, Cut cut, Visit&& visit) {
    const float above = cut.above();
#pragma unroll 1
    for (int at = threadIdx.x * 4; at < width; at += kThreads * 4) visit(Four(values, at, cut, above), at);
}

template <typename Visit>
__device__ __forceinline__ void for_each(const float* values, int width, Cut cut, Visit&& visit) {
    for_each_four(values, width, cut, [&](const Four& four, int at) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (four.values[e] >= four.least) visit(four.values[e], at + e);
    });
}

// For few tokens: one branch for four of them.
template <typename Visit>
__device__ __forceinline__ void for_each_of_few(const float* values, int width, Cut cut, Visit&& visit) {
    for_each_four(values, width, cut, [&](const Four& four, int at) {
        const float most = fmaxf(fmaxf(four.values[0], four.values[1]), fmaxf(four.values[2], four.values[3]));
        if (!(most >= four.least)) return;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (four.values[e] >= four.least) visit(four.values[e], at + e);
    });
}

// exp((x - max) / temperature): as a number, as an integer in units of 2^-36, and in bins, the largest values first.
struct Weights {
    float scale, offset;

    __device__ __forceinline__ float number(float value) const { return exp2_of(fmaf(value, scale, -offset)); }
    __device__ __forceinline__ uint64 operator()(float value) const { return __float2ull_rn(number(value) * kOne); }
    // The bin, beyond the last one too, on top of the bits of kToInteger.
    __device__ __forceinline__ unsigned bin_bits(float value, float last) const {
        const float place = fmaf(value, -kBinsPerHalving * scale, kBinsPerHalving * offset);
        return __float_as_uint(fminf(place, last) + kToInteger);
    }
};

// --- what is left in, and what is drawn ----------------------------------------------------------------

// The amount of the first `count` of this lane's four tokens of a group: their weights, or how many have one value.
template <bool kOfValue>
__device__ __forceinline__ uint64 amount_of(
    const float* values, int width, int at, int count, Cut cut, float above, Weights weights, float value) {
    if (at >= width) return 0;
    const Four four(values, at, cut, above);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (e < count && four.values[e] >= four.least)
            sum += kOfValue ? four.values[e] == value : weights.number(four.values[e]);
    return __float2ull_rn(kOfValue ? sum : sum * kOne);
}

// The first token, in their order, at which a sum over those that `cut` keeps reaches its target: over their weights, a
// number drawn from all of them with `random`; or over the tokens of one value, of which it is number `random`.
template <bool kInShared, bool kOfValue>
__device__ __noinline__ int token_at(float* lent, int width, Cut cut, Weights weights, float value, uint64 random) {
    const float* const values = values_of<kInShared>(lent);
    const float above = cut.above();
    // A part is what one amount stands for: a group, or several behind each other where there are more than kBins.
    const int num_groups = (width + kGroup - 1) / kGroup;
    const int in_part = kInShared ? 1 : (num_groups + kBins - 1) / kBins;
    const int num_parts = (num_groups + in_part - 1) / in_part;
#pragma unroll 1
    for (int part = warp_of(); part < num_parts; part += kWarps) {
        uint64 sum = 0;
#pragma unroll 1
        for (int i = 0; i < in_part; ++i) {
            const int at = (part * in_part + i) * kGroup + lane_of() * 4;
            sum += sum_of_warp(amount_of<kOfValue>(values, width, at, 4, cut, above, weights, value));
        }
        if (lane_of() == 0) shared.low[part] = static_cast<unsigned>(sum), shared.high[part] = sum >> 32;
    }
    __syncthreads();
    const int place = 2 * threadIdx.x;
    const uint64 first = place < num_parts ? amount_at(place) : 0;
    const uint64 second = place + 1 < num_parts ? amount_at(place + 1) : 0;
    const Sums sums = sum_before(first + second);
    if (sums.total == 0) return kNoToken;
    locate(sums.before, first, second, kOfValue ? random : __umul64hi(random, sums.total) + 1);
    const int begin = shared.place * in_part * kGroup + lane_of() * 4;
    const uint64 target = shared.left;
    __syncthreads();
    if (warp_of() == 0) {
        uint64 before = 0;
#pragma unroll 1
        for (int i = 0; i < in_part; ++i) {
            const int at = begin + i * kGroup;
            const uint64 sum = amount_of<kOfValue>(values, width, at, 4, cut, above, weights, value);
            const uint64 up_to = sum_up_to_lane(sum), reached = before + up_to - sum;
            if (reached < target && target <= reached + sum) {
                int e = 0;
                while (reached + amount_of<kOfValue>(values, width, at, e + 1, cut, above, weights, value) < target)
                    ++e;
                shared.place = at + e;
            }
            before += __shfl_sync(kAllLanes, up_to, 31);
        }
    }
    __syncthreads();
    return shared.place;
}

// The listed token at which the sum of amounts, from the best one on, reaches `target`.
__device__ __forceinline__ Cut cut_in_list(int num_listed, uint64 target) {
    const Compared mine = compare_listed(num_listed, kByOrder);
    if (mine.place >= 0 && mine.sums.before < target && target <= mine.sums.before + shared.listed_amounts[mine.place])
        shared.place = mine.place;
    __syncthreads();
    const Best last = best_in(shared.listed[min(shared.place, kMaxListed - 1)]);  // none is found among NaN
    __syncthreads();
    return {last.value, last.id};
}

// A value such that the `count` best tokens are no less, and few others. `mine` is this thread's best.
__device__ __noinline__ Cut least_of_best(int count, float mine) {
    const unsigned key = key_of(mine) >> 16;
    unsigned least = 0;
#pragma unroll 1
    for (unsigned bit = 1u << 15; bit; bit /= 2)
        if (__syncthreads_count(key >= (least | bit)) >= count) least |= bit;
    const float value = value_of(least << 16);
    return {value == value ? value : -infinity(), kNoToken};
}

// Where the sum of amounts from the best token on reaches its target: `most` tokens, or this share of all weights.
template <bool kByWeight> __device__ __forceinline__ uint64 target_of(double most, uint64 total) {
    const uint64 target = static_cast<uint64>(ceil(kByWeight ? most * static_cast<double>(total) : most));
    return min(max(target, uint64{1}), total);
}

// As `cut_at`, bit by bit of the values.
template <bool kInShared, bool kByWeight>
__device__ __noinline__ Cut cut_by_bits(float* lent, int width, Cut outer, Weights weights, double most) {
    const float* const values = values_of<kInShared>(lent);
    const Amounts amounts;
    unsigned prefix = 0;
    uint64 target = 0;
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {
        const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
        clear_amounts();
        for_each(values, width, outer, [&](float value, int) {
            const unsigned key = key_of(value);
            if (level && key >> ((shift + bits) & 31) != prefix) return;
            const uint64 amount = kByWeight ? weights(value) : 1;
            const int bin = key >> shift & ((1 << bits) - 1);
            const unsigned address = amounts.low + 4 * bin;
            amounts.add_high(address, amounts.carried(amount, add_at(address, static_cast<unsigned>(amount))));
        });
        __syncthreads();
        const int bin = kBins - 1 - 2 * threadIdx.x;  // the largest values first
        const uint64 first = amount_at(bin), second = amount_at(bin - 1);
        const Sums sums = sum_before(first + second);
        if (sums.total == 0) return outer;
        if (level == 0) target = target_of<kByWeight>(most, sums.total);
        locate(sums.before, first, second, target);
        prefix = prefix << bits | (kBins - 1 - shared.place);
        target = shared.left;
    }
    const float value = value_of(prefix);
    const uint64 each = kByWeight ? weights(value) : 1, rank = (target + each - 1) / each;
    const bool all = rank * each >= shared.amount;
    __syncthreads();
    if (all) return {value, value == outer.value ? outer.id : kNoToken};
    return {value, token_at<kInShared, true>(lent, width, outer, weights, value, rank)};
}

// The last of the `most` best tokens among those that `outer` keeps; or of the best with this share of their weight.
template <bool kInShared, bool kByWeight>
__device__ __noinline__ Cut cut_at(float* lent, int width, Cut outer, Weights weights, double most) {
    const float* const values = values_of<kInShared>(lent);
    const Amounts amounts;
    const unsigned zero = __float_as_uint(kToInteger), rest = address_in_shared(shared.rest + lane_of());
    clear_amounts();
    for_each_four(values, width, outer, [&](const Four& four, int) {
        uint64 each[4];
        unsigned addresses[4], carried[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float value = four.values[e] >= four.least ? four.values[e] : -infinity();
            const unsigned bin = weights.bin_bits(value, kBins - 1) - zero;
            // The last bin, which all threads have much of, is spread out. So little is in it that nothing is carried.
            addresses[e] = bin == kBins - 1 ? rest : amounts.low + 4 * bin;
            each[e] = kByWeight ? weights(value) : 1;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) carried[e] = add_at(addresses[e], static_cast<unsigned>(each[e]));
        if (kByWeight) {
#pragma unroll
            for (int e = 0; e < 4; ++e) carried[e] = amounts.carried(each[e], carried[e]);
            if (carried[0] | carried[1] | carried[2] | carried[3]) {
#pragma unroll
                for (int e = 0; e < 4; ++e) amounts.add_high(addresses[e], carried[e]);
            }
        }
    });
    __syncthreads();
    const uint64 first = amount_at(2 * threadIdx.x);
    uint64 second = amount_at(2 * threadIdx.x + 1);
    if (warp_of() == kWarps - 1) {
        const uint64 far = sum_of_warp(shared.rest[lane_of()]);
        if (lane_of() == 31) second = far;
    }
    const Sums sums = sum_before(first + second);
    if (sums.total == 0) return outer;
    locate(sums.before, first, second, target_of<kByWeight>(most, sums.total));
    const int bin = shared.place;
    const uint64 target = shared.left;
    begin_list();
    if (bin < kBins - 1) {
        for_each_four(values, width, outer, [&](const Four& four, int at) {
            bool is_there[4];
#pragma unroll
            for (int e = 0; e < 4; ++e)
                is_there[e] =
                    four.values[e] >= four.least && weights.bin_bits(four.values[e], infinity()) - zero == bin;
            if (!(is_there[0] || is_there[1] || is_there[2] || is_there[3])) return;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (is_there[e]) add_to_list(four.values[e], at + e, kByWeight ? weights(four.values[e]) : 1);
        });
        __syncthreads();
        const int num_listed = shared.num_listed;
        if (num_listed <= kMaxListed) return cut_in_list(num_listed, target);
    }
    return cut_by_bits<kInShared, kByWeight>(lent, width, outer, weights, most);
}

// Draws among the `top_k` best of the listed tokens which `cut` keeps, and of these the best with the share `top_p`.
__device__ __noinline__ int draw_in_list(
    int num_listed, int top_k, Cut cut, double top_p, Weights weights, uint64 random) {
    Compared mine = compare_listed(num_listed, kByOrder);
    __syncthreads();
    if (mine.place >= 0) {
        const float value = best_in(shared.listed[mine.place]).value;
        const bool is_kept = mine.sums.before < top_k && value >= cut.value;
        shared.listed_amounts[mine.place] = is_kept ? weights(value) : 0;
    }
    __syncthreads();
    if (top_p < 1) {
        mine = compare_listed(num_listed, kByOrder);
        __syncthreads();
        if (mine.place >= 0 && mine.sums.before >= target_of<true>(top_p, mine.sums.total))
            shared.listed_amounts[mine.place] = 0;
        __syncthreads();
    }
    mine = compare_listed(num_listed, kById);
    if (mine.place >= 0) {
        const uint64 target = __umul64hi(random, mine.sums.total) + 1;
        if (mine.sums.before < target && target <= mine.sums.before + shared.listed_amounts[mine.place])
            shared.place = best_in(shared.listed[mine.place]).id;
    }
    __syncthreads();
    return shared.place;
}
