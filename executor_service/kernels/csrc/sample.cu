// sample: log probabilities, biases, penalties, bans, filters and a draw, one block per row of logits.
//
// A row that needs more than its argmax is kept as float32, in shared memory where it fits, else in memory that the
// caller lends. A probability is an integer: exp((x - max) / temperature) in units of 2^-40. Their sums are exact, so
// the draw is an exact inverse transform of what these integers say, whatever the order of additions. Thresholds come
// from a radix selection: three histograms of the bits of the value, by number of tokens or by probability.
#include "dependent.cuh"
#include "numbers.cuh"
#include "sample_block.cuh"

namespace {

constexpr float kOne = 1099511627776.0f;  // a probability of 1, before normalisation: 2^40
// Up to so many of the best are found among those that are no less than the least of all warps' (or parts of a warp's)
// best; of these there are at least as many as there are warps (or parts).
constexpr int kMaxTopOfWarps = 32, kMaxTopOfHalves = 64;

enum Real { kTemperature, kMinP, kTopP, kRepetition, kPresence, kFrequency, kNumReals };
enum Integer {
    kSeed, kTopK, kNumLogprobs, kHasPenalties, kNumBiases, kNumBans, kNumHeldBack, kHeldBackUntil, kNumIntegers
};

struct Tables {
    const double* reals;
    const long long* integers;
    const int* bias_ids;
    const double* bias_values;
    const int* ban_ids;
    const unsigned char* prompt_seen;
    short* output_counts;
    int max_biases, max_bans, seen_bytes, counts_width;
};

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- a row's values ----------------------------------------------------------------------------------

// Every thread has the same elements in every pass; in token order they are 4 of each group of kGroup.
template <typename Visit> __device__ __forceinline__ void for_each(const float* values, int width, Visit&& visit) {
    for (int at = threadIdx.x * 4; at < width; at += kThreads * 4) {
        const float4 pack = *reinterpret_cast<const float4*>(values + at);
        visit(pack.x, at);
        visit(pack.y, at + 1);
        visit(pack.z, at + 2);
        visit(pack.w, at + 3);
    }
}

// `measure(value, id)` of a group's tokens: this lane's four.
template <typename Measure>
__device__ __forceinline__ void measure_group(
    const float* values, int width, int group, uint64 (&amounts)[4], Measure&& measure) {
    const int at = group * kGroup + lane_of() * 4;
    for (int e = 0; e < 4; ++e) amounts[e] = 0;
    if (at >= width) return;
    const float4 pack = *reinterpret_cast<const float4*>(values + at);
    amounts[0] = measure(pack.x, at);
    amounts[1] = measure(pack.y, at + 1);
    amounts[2] = measure(pack.z, at + 2);
    amounts[3] = measure(pack.w, at + 3);
}

// The first token, in their order, at which the sum of `measure` reaches `target_of(total)`, which is 1 to the total.
template <typename Measure, typename Target>
__device__ __forceinline__ int token_at(
    const float* values, int width, Shared& shared, Measure&& measure, Target&& target_of) {
    const int num_groups = (width + kGroup - 1) / kGroup;
    uint64 amounts[4];
    clear_amounts(shared);
    for (int group = warp_of(); group < num_groups; group += kWarps) {
        measure_group(values, width, group, amounts, measure);
        const uint64 sum = sum_of_warp(amounts[0] + amounts[1] + amounts[2] + amounts[3]);
        if (lane_of() == 0) shared.low[group] = static_cast<unsigned>(sum), shared.high[group] = sum >> 32;
    }
    __syncthreads();
    const uint64 first = amount_at(2 * threadIdx.x, shared), second = amount_at(2 * threadIdx.x + 1, shared);
    uint64 total;
    const uint64 before = sum_before(first + second, total, shared);
    if (total == 0) return kNoToken;
    locate(before, first, second, target_of(total), shared);
    const int group = shared.place;
    const uint64 target = shared.left;
    __syncthreads();
    if (warp_of() == 0) {
        measure_group(values, width, group, amounts, measure);
        const uint64 sum = amounts[0] + amounts[1] + amounts[2] + amounts[3];
        uint64 reached = sum_up_to_lane(sum) - sum;
        if (reached < target && target <= reached + sum) {
            int e = 0;
            while (reached + amounts[e] < target) reached += amounts[e++];
            shared.place = group * kGroup + lane_of() * 4 + e;
        }
    }
    __syncthreads();
    return shared.place;
}

// --- what is left in ----------------------------------------------------------------------------------

// The last token that is kept, in the order of falling values and rising ids.
struct Cut {
    float value;
    int id;

    __device__ __forceinline__ bool keeps(float other, int other_id) const {
        return other > value || (other == value && other_id <= id);
    }
};

// exp((x - max) / temperature) as an integer, 0 where min-p leaves the token out.
struct Weights {
    float max, scale, least;

    __device__ __forceinline__ uint64 operator()(float value) const {
        if (value == max) return static_cast<uint64>(kOne);
        const float below = value - max;
        return below >= least ? __float2ull_rn(exp2_of(below * scale) * kOne) : 0;
    }
};

// The last token within `target_of(total)` of the amounts that `measure` gives to values, among those that `outer` keeps.
template <typename Measure, typename Target>
__device__ __forceinline__ Cut cut_at(
    const float* values, int width, Cut outer, Shared& shared, Measure&& measure, Target&& target_of) {
    unsigned prefix = 0;
    uint64 target = 0;
#pragma unroll
    for (int level = 0; level < 3; ++level) {
        const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
        clear_amounts(shared);
        for_each(values, width, [&](float value, int id) {
            const unsigned key = key_of(value);
            if ((level && key >> ((shift + bits) & 31) != prefix) || !outer.keeps(value, id)) return;
            const uint64 amount = measure(value);
            if (amount) add_amount(key >> shift & ((1 << bits) - 1), amount, shared);
        });
        __syncthreads();
        const int bin = kBins - 1 - 2 * threadIdx.x;  // the largest values first
        const uint64 first = amount_at(bin, shared), second = amount_at(bin - 1, shared);
        uint64 total;
        const uint64 before = sum_before(first + second, total, shared);
        if (total == 0) return outer;
        if (level == 0) target = target_of(total);
        locate(before, first, second, target, shared);
        prefix = prefix << bits | (kBins - 1 - shared.place);
        target = shared.left;
    }
    const float value = value_of(prefix);
    const uint64 each = measure(value), rank = (target + each - 1) / each;
    const bool all = rank * each >= shared.amount;
    __syncthreads();
    if (all) return {value, value == outer.value ? outer.id : kNoToken};
    const auto is_tie = [&](float other, int id) -> uint64 { return other == value && outer.keeps(other, id); };
    return {value, token_at(values, width, shared, is_tie, [&](uint64) { return rank; })};
}

// Lists the tokens that `keeps` keeps; their number, of which no more than kMaxListed are in the list.
template <typename Keeps>
__device__ __forceinline__ int list_tokens(const float* values, int width, Shared& shared, Keeps&& keeps) {
    if (threadIdx.x == 0) shared.num_listed = 0;
    __syncthreads();
    for_each(values, width, [&](float value, int id) {
        if (!keeps(value, id)) return;
        const int place = atomicAdd(&shared.num_listed, 1);
        if (place < kMaxListed) shared.listed_values[place] = value, shared.listed_ids[place] = id;
    });
    __syncthreads();
    return shared.num_listed;
}

// Lists the `count` best tokens and maybe some more; returns how many. `mine` is the best value of this thread's.
__device__ __forceinline__ int list_best(const float* values, int width, int count, float mine, Shared& shared) {
    unsigned key = key_of(mine);
    for (int offset = 8; offset; offset /= 2) key = max(key, __shfl_xor_sync(kAllLanes, key, offset));
    if (count <= kMaxTopOfWarps) key = max(key, __shfl_xor_sync(kAllLanes, key, 16));
    const float least = value_of(min_of_block(key, shared));
    return list_tokens(values, width, shared, [&](float value, int) { return value >= least; });
}

// How many of the list come before this thread's, in the order of falling values and rising ids.
__device__ __forceinline__ int rank_in_list(int num_listed, const Shared& shared) {
    const float value = shared.listed_values[threadIdx.x];
    const int id = shared.listed_ids[threadIdx.x];
    int rank = 0;
    for (int i = 0; i < num_listed; ++i) {
        const float other = shared.listed_values[i];
        rank += other > value || (other == value && shared.listed_ids[i] < id);
    }
    return rank;
}

__device__ __forceinline__ Cut top_k_cut(const float* values, int width, int top_k, float mine, Shared& shared) {
    if (top_k <= kMaxTopOfHalves) {
        const int num_listed = list_best(values, width, top_k, mine, shared);
        if (num_listed <= kMaxListed) {
            if (threadIdx.x < num_listed && rank_in_list(num_listed, shared) == top_k - 1) shared.place = threadIdx.x;
            __syncthreads();
            const Cut cut = {shared.listed_values[shared.place], shared.listed_ids[shared.place]};
            __syncthreads();
            return cut;
        }
    }
    const Cut everything = {-infinity(), kNoToken};
    return cut_at(values, width, everything, shared, [](float) -> uint64 { return 1; },
                  [&](uint64) -> uint64 { return top_k; });
}

// --- the steps ----------------------------------------------------------------------------------------

// Philox 4x32-10 on the counter (number, 0) with the key `seed`: the first two words, of which 53 bits count.
__device__ __forceinline__ uint64 random_bits(uint64 seed, uint64 number) {
    unsigned c0 = number, c1 = number >> 32, c2 = 0, c3 = 0, k0 = seed, k1 = seed >> 32;
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (static_cast<uint64>(c0) << 32 | c1) & ~uint64{0x7ff};
}

// The row's best token; `mine` is this thread's. The values are kept where there is a place for them.
template <typename T>
__device__ __forceinline__ Best load_row(const T* logits, int width, float* values, Best& mine, Shared& shared) {
    mine = {-infinity(), kNoToken};
    constexpr int kPack = kWide<T>;
    const int whole = width * sizeof(T) % 16 ? 0 : width;  // else rows do not begin at multiples of 16 bytes
    for (int at = threadIdx.x * kPack; at < whole; at += kThreads * kPack) {
        const Pack<T, kPack> pack = load<T, kPack>(logits + at);
        float numbers[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
            numbers[e] = to_float(pack.elements[e]) + 0.0f;  // -0 becomes 0
            mine.consider(numbers[e], at + e);
        }
        if (values == nullptr) continue;
#pragma unroll
        for (int e = 0; e < kPack; e += 4)
            *reinterpret_cast<float4*>(values + at + e) =
                make_float4(numbers[e], numbers[e + 1], numbers[e + 2], numbers[e + 3]);
    }
    for (int at = whole + threadIdx.x; at < width; at += kThreads) {
        const float number = to_float(logits[at]) + 0.0f;
        mine.consider(number, at);
        if (values != nullptr) values[at] = number;
    }
    if (values != nullptr && threadIdx.x < (-width & 3)) values[width + threadIdx.x] = -infinity();
    return best_of_block(mine, shared);
}

// Biases, bans and penalties; a ban is one whether it comes before penalties or behind. Returns what load_row does.
__device__ __forceinline__ Best adjust_row(
    float* values, int width, int slot, const Tables& tables, bool is_held_back, Best& mine, Shared& shared) {
    const long long* integers = tables.integers + slot * kNumIntegers;
    const double* reals = tables.reals + slot * kNumReals;
    const int num_biases = integers[kNumBiases];
    const int num_bans = integers[kNumBans] + (is_held_back ? integers[kNumHeldBack] : 0);
    for (int i = threadIdx.x; i < num_biases; i += kThreads) {
        const int id = tables.bias_ids[static_cast<long long>(slot) * tables.max_biases + i];
        const double bias = tables.bias_values[static_cast<long long>(slot) * tables.max_biases + i];
        if (id < width) values[id] = static_cast<float>(values[id] + bias) + 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_bans; i += kThreads) {
        const int id = tables.ban_ids[static_cast<long long>(slot) * tables.max_bans + i];
        if (id < width) values[id] = -infinity();
    }
    __syncthreads();
    mine = {-infinity(), kNoToken};
    if (!integers[kHasPenalties]) {
        for_each(values, width, [&](float value, int id) { mine.consider(value, id); });
        return best_of_block(mine, shared);
    }
    const double repetition = reals[kRepetition], reciprocal = 1.0 / repetition;
    const double presence = reals[kPresence], frequency = reals[kFrequency];
    const unsigned char* seen = tables.prompt_seen + static_cast<long long>(slot) * tables.seen_bytes;
    const short* counts = tables.output_counts + static_cast<long long>(slot) * tables.counts_width;
    for (int at = threadIdx.x * 4; at < width; at += kThreads * 4) {
        const unsigned in_prompt = seen[at / 8] >> (at & 4);
        const Pack<short, 4> in_output = load<short, 4>(counts + at);
        float4 pack = *reinterpret_cast<float4*>(values + at);
        float* const four = &pack.x;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int count = in_output.elements[e];
            if (count || in_prompt >> e & 1) {
                double value = four[e];
                value *= value > 0 ? reciprocal : repetition;
                four[e] = static_cast<float>(value - frequency * count - (count ? presence : 0.0)) + 0.0f;
            }
            mine.consider(four[e], at + e);
        }
        *reinterpret_cast<float4*>(values + at) = pack;
    }
    return best_of_block(mine, shared);
}

// The logarithm of the sum of exp(value - max) over the row, and the likeliest tokens' log probabilities.
__device__ __forceinline__ double score_row(
    const float* values, int width, int num_top, float max, float mine, double* logprobs, int* top_ids,
    Shared& shared) {
    float sum = 0.0f;
    for_each(values, width, [&](float value, int) {
        sum += value == max ? 1.0f : exp2_of((value - max) * 1.44269504f);
    });
    const double log_sum = log(sum_of_block(sum, shared));
    num_top = min(num_top, width);
    if (num_top <= 0) return log_sum;
    int num_listed = list_best(values, width, num_top, mine, shared);
    if (num_listed > kMaxListed) {
        const Cut everything = {-infinity(), kNoToken};
        const Cut cut = cut_at(values, width, everything, shared, [](float) -> uint64 { return 1; },
                               [&](uint64) -> uint64 { return num_top; });
        num_listed = list_tokens(values, width, shared, [&](float value, int id) { return cut.keeps(value, id); });
        num_listed = min(num_listed, kMaxListed);
    }
    if (threadIdx.x < num_listed) {
        const int rank = rank_in_list(num_listed, shared);
        if (rank < num_top) {
            const float value = shared.listed_values[threadIdx.x];
            logprobs[rank] = (value == max ? 0.0 : static_cast<double>(value - max)) - log_sum;
            top_ids[rank] = shared.listed_ids[threadIdx.x];
        }
    }
    __syncthreads();
    return log_sum;
}

__device__ __forceinline__ int draw_token(
    const float* values, int width, Best best, float mine, const double* reals, const long long* integers,
    uint64 number, Shared& shared) {
    if (best.value == -infinity()) return best.id;  // nothing is possible
    const double temperature = reals[kTemperature], min_p = reals[kMinP], top_p = reals[kTopP];
    const double scale = 1.4426950408889634 / temperature;
    Weights weights;
    weights.max = best.value;
    weights.scale = scale < 1e30 ? static_cast<float>(scale) : 1e30f;
    weights.least = min_p > 0 ? static_cast<float>(temperature * log(min_p)) : -infinity();
    Cut cut = {-infinity(), kNoToken};
    const long long top_k = integers[kTopK];
    if (top_k > 0 && top_k < width) cut = top_k_cut(values, width, static_cast<int>(top_k), mine, shared);
    if (top_p < 1) {
        cut = cut_at(values, width, cut, shared, weights, [&](uint64 total) {
            const uint64 target = static_cast<uint64>(ceil(top_p * static_cast<double>(total)));
            return min(max(target, uint64{1}), total);
        });
    }
    const uint64 bits = random_bits(integers[kSeed], number);
    const int token = token_at(
        values, width, shared,
        [&](float value, int id) { return cut.keeps(value, id) ? weights(value) : uint64{0}; },
        [&](uint64 total) { return __umul64hi(bits, total) + 1; });
    return token < width ? token : best.id;
}

template <typename T, bool kInShared>
__device__ __forceinline__ void sample_row(
    const T* all_logits, int width, const long long* slots, const long long* numbers, const Tables& tables,
    float* lent, long long* token_ids, double* logprobs, int* top_ids, int max_logprobs) {
    extern __shared__ float4 row_in_shared[];
    __shared__ Shared shared;
    wait_for_previous();
    let_next_begin();
    const long long row = blockIdx.x;
    const int slot = slots[row];
    if (slot < 0) {
        if (threadIdx.x == 0) token_ids[row] = 0;
        return;
    }
    const T* logits = all_logits + row * width;
    const long long* integers = tables.integers + static_cast<long long>(slot) * kNumIntegers;
    const double* reals = tables.reals + static_cast<long long>(slot) * kNumReals;
    const int num_top = integers[kNumLogprobs];
    const bool is_drawn = reals[kTemperature] > 0, is_penalized = integers[kHasPenalties];
    const bool is_held_back = integers[kNumHeldBack] && numbers[row] < integers[kHeldBackUntil];
    const bool is_changed = is_penalized || is_held_back || integers[kNumBiases] || integers[kNumBans];
    float* values = kInShared ? reinterpret_cast<float*>(row_in_shared) : lent + row * ((width + 3) / 4 * 4);
    Best mine;
    Best best = load_row(logits, width, is_drawn || is_changed || num_top >= 0 ? values : nullptr, mine, shared);
    const float max = best.value;
    double log_sum = 0.0;
    if (num_top >= 0) {
        double* const top = logprobs + row * (1 + max_logprobs) + 1;
        log_sum = score_row(values, width, num_top, max, mine.value, top, top_ids + row * max_logprobs, shared);
    }
    if (is_changed) best = adjust_row(values, width, slot, tables, is_held_back, mine, shared);
    if (best.id >= width) best.id = 0;
    int token = best.id;
    if (is_drawn) token = draw_token(values, width, best, mine.value, reals, integers, numbers[row], shared);
    if (threadIdx.x) return;
    token_ids[row] = token;
    if (is_penalized) {
        short& count = tables.output_counts[static_cast<long long>(slot) * tables.counts_width + token];
        if (count < 0x7fff) ++count;
    }
    if (num_top >= 0) {
        const float value = to_float(logits[token]);
        logprobs[row * (1 + max_logprobs)] = (value == max ? 0.0 : static_cast<double>(value - max)) - log_sum;
    }
}

}  // namespace

#define KERNEL(NAME, T, PLACE, IN_SHARED)                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads) sample_##NAME##_##PLACE(                                 \
        const T* logits, const long long* slots, const long long* numbers, const double* reals,                     \
        const long long* integers, const int* bias_ids, const double* bias_values, const int* ban_ids,              \
        const unsigned char* prompt_seen, short* output_counts, float* lent, long long* token_ids,                  \
        double* logprobs, int* top_ids, int width, int max_biases, int max_bans, int seen_bytes, int counts_width,  \
        int max_logprobs) {                                                                                         \
        const Tables tables = {reals, integers, bias_ids, bias_values, ban_ids, prompt_seen, output_counts,         \
                               max_biases, max_bans, seen_bytes, counts_width};                                     \
        sample_row<T, IN_SHARED>(logits, width, slots, numbers, tables, lent, token_ids, logprobs, top_ids,         \
                                 max_logprobs);                                                                     \
    }
#define PLACES(NAME, T)           \
    KERNEL(NAME, T, shared, true) \
    KERNEL(NAME, T, lent, false)
FOR_EACH_DTYPE(PLACES)
