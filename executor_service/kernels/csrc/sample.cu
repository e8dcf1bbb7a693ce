// sample: log probabilities, biases, penalties, bans, filters and a draw, one block per row of logits.
//
// A row that needs more than its argmax is kept as float32, in shared memory where it fits, else in memory that the
// caller lends. A probability is an integer: exp((x - max) / temperature) in units of 2^-36. Their sums are exact, so
// the draw is an exact inverse transform of what these integers say, whatever the order of additions. (Only within the
// 4 tokens that a thread reads together are they added as float32, always in the same order.)
//
// No sort: a threshold, by number of tokens or by probability, lies in one bin of a histogram over the distance from
// the largest value; the few tokens of that bin are listed and compared with each other. Where they are many, as among
// equal values, a radix selection over the bits of the values takes the histogram's place.
#include "dependent.cuh"
#include "numbers.cuh"
#include "sample_row.cuh"

namespace {

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

// The tables' rows of this block's request; in shared memory, since as a function's argument it goes through memory.
struct Parameters {
    const double* reals;
    const long long* integers;
    const int* bias_ids;
    const double* bias_values;
    const int* ban_ids;
    const unsigned char* prompt_seen;
    short* output_counts;

    __device__ __forceinline__ void point_to(long long slot, const Tables& tables) {
        reals = tables.reals + slot * kNumReals;
        integers = tables.integers + slot * kNumIntegers;
        bias_ids = tables.bias_ids + slot * tables.max_biases;
        bias_values = tables.bias_values + slot * tables.max_biases;
        ban_ids = tables.ban_ids + slot * tables.max_bans;
        prompt_seen = tables.prompt_seen + slot * tables.seen_bytes;
        output_counts = tables.output_counts + slot * tables.counts_width;
    }
};

__shared__ Parameters parameters;

__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
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

// Elements of a row that can be read in packs: all, or none where rows do not begin at multiples of 16 bytes.
template <typename T> __device__ __forceinline__ int in_packs(int width) { return width * sizeof(T) % 16 ? 0 : width; }

template <typename T>
__device__ __forceinline__ void take(const Pack<T, kWide<T>>& pack, int at, float* values, Best& mine) {
    float numbers[kWide<T>];
#pragma unroll
    for (int e = 0; e < kWide<T>; ++e) {
        numbers[e] = to_float(pack.elements[e]) + 0.0f;  // -0 becomes 0
        mine.consider(numbers[e], at + e);
    }
    if (values == nullptr) return;
#pragma unroll
    for (int e = 0; e < kWide<T>; e += 4)
        *reinterpret_cast<float4*>(values + at + e) =
            make_float4(numbers[e], numbers[e + 1], numbers[e + 2], numbers[e + 3]);
}

// This thread's first pack of a row, on its way while parameters are looked up.
template <typename T> __device__ __forceinline__ Pack<T, kWide<T>> first_pack(const T* logits, int width) {
    const int at = threadIdx.x * kWide<T>;
    return at < in_packs<T>(width) ? load<T, kWide<T>>(logits + at) : Pack<T, kWide<T>>();
}

// This thread's best token. The values are kept where there is a place for them.
template <typename T>
__device__ __forceinline__ Best load_row(const T* logits, int width, Pack<T, kWide<T>> pack, float* values) {
    Best mine = {-infinity(), kNoToken};
    const int whole = in_packs<T>(width);
    int at = threadIdx.x * kWide<T>;
#pragma unroll 1
    while (at < whole) {
        const int next = at + kThreads * kWide<T>;
        const Pack<T, kWide<T>> coming = next < whole ? load<T, kWide<T>>(logits + next) : pack;
        take<T>(pack, at, values, mine);
        pack = coming, at = next;
    }
#pragma unroll 1
    for (at = whole + threadIdx.x; at < width; at += kThreads) {
        const float number = to_float(logits[at]) + 0.0f;
        mine.consider(number, at);
        if (values != nullptr) values[at] = number;
    }
    if (values != nullptr && threadIdx.x < (-width & 3)) values[width + threadIdx.x] = -infinity();
    return mine;
}

// Lets the counts come as near as the L2 cache.
__device__ __forceinline__ void request_counts(const short* counts, int width) {
    constexpr int kLine = 64;
    for (int at = threadIdx.x * kLine; at < width; at += kThreads * kLine) prefetch(counts + at);
}

// Penalties of the tokens in prompt and output; this thread's best token.
__device__ __forceinline__ Best penalize_row(float* values, int width) {
    const float repetition = static_cast<float>(parameters.reals[kRepetition]), reciprocal = 1.0f / repetition;
    const float presence = static_cast<float>(parameters.reals[kPresence]);
    const float frequency = static_cast<float>(parameters.reals[kFrequency]);
    Best mine = {-infinity(), kNoToken};
    constexpr int kInFlight = 4;
#pragma unroll 1
    for (int begin = threadIdx.x * 4; begin < width; begin += kInFlight * kThreads * 4) {
        Pack<short, 4> in_output[kInFlight];
        unsigned in_prompt[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int at = begin + k * kThreads * 4;
            if (at >= width) continue;
            in_output[k] = load<short, 4>(parameters.output_counts + at);
            in_prompt[k] = parameters.prompt_seen[at / 8] >> (at & 4);
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int at = begin + k * kThreads * 4;
            if (at >= width) continue;
            float4 pack = *reinterpret_cast<float4*>(values + at);
            float* const four = &pack.x;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int count = in_output[k].elements[e];
                if (count || in_prompt[k] >> e & 1) {
                    const float repeated = four[e] * (four[e] > 0 ? reciprocal : repetition);
                    four[e] = fmaf(-frequency, static_cast<float>(count), repeated) - (count ? presence : 0.0f) + 0.0f;
                }
                mine.consider(four[e], at + e);
            }
            *reinterpret_cast<float4*>(values + at) = pack;
        }
    }
    return mine;
}

// Biases, bans and penalties; a ban is one whether it comes before penalties or behind. Returns what load_row does.
template <bool kInShared> __device__ __noinline__ Best adjust_row(float* lent, int width, bool is_held_back) {
    float* const values = values_of<kInShared>(lent);
    const long long* const integers = parameters.integers;
    const int num_biases = integers[kNumBiases];
    const int num_bans = integers[kNumBans] + (is_held_back ? integers[kNumHeldBack] : 0);
    for (int i = threadIdx.x; i < num_biases; i += kThreads) {
        const int id = parameters.bias_ids[i];
        if (id < width) values[id] = static_cast<float>(values[id] + parameters.bias_values[i]) + 0.0f;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_bans; i += kThreads) {
        const int id = parameters.ban_ids[i];
        if (id < width) values[id] = -infinity();
    }
    __syncthreads();
    if (integers[kHasPenalties]) return penalize_row(values, width);
    Best mine = {-infinity(), kNoToken};
    for_each(values, width, everything(), [&](float value, int id) { mine.consider(value, id); });
    return mine;
}

// The logarithm of the sum of exp(value - max) over the row, and the likeliest tokens' log probabilities.
template <bool kInShared>
__device__ __noinline__ double score_row(
    float* lent, int width, int num_top, float max, float mine, double* logprobs, int* top_ids) {
    const float* const values = values_of<kInShared>(lent);
    num_top = min(num_top, width);
    const float least = num_top > 0 ? least_of_best(num_top, mine).value : infinity();
    begin_list();
    float sum = 0.0f;
    for_each_four(values, width, everything(), [&](const Four& four, int at) {
        float most = -infinity();
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            sum += exp2_of((four.values[e] - max) * 1.44269504f);
            most = fmaxf(most, four.values[e]);
        }
        if (!(most >= least && num_top > 0)) return;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (four.values[e] >= least) add_to_list(four.values[e], at + e, 1);
    });
    const double log_sum = log(sum_of_block(sum));
    if (num_top <= 0) return log_sum;
    int num_listed = shared.num_listed;
    if (num_listed > kMaxListed) {
        const Cut cut = cut_by_bits<kInShared, false>(lent, width, everything(), Weights(), num_top);
        begin_list();
        for_each_of_few(values, width, cut, [&](float value, int id) { add_to_list(value, id, 1); });
        __syncthreads();
        num_listed = min(shared.num_listed, kMaxListed);
    }
    const Compared place = compare_listed(num_listed, kByOrder);
    const int rank = static_cast<int>(place.sums.before);
    if (place.place >= 0 && rank < num_top) {
        const Best token = best_in(shared.listed[place.place]);
        logprobs[rank] = static_cast<double>(token.value - max) - log_sum;
        top_ids[rank] = token.id;
    }
    __syncthreads();
    return log_sum;
}

template <bool kInShared>
__device__ __noinline__ int draw_token(float* lent, int width, Best best, float mine, uint64 number) {
    const double* const reals = parameters.reals;
    const long long* const integers = parameters.integers;
    const float* const values = values_of<kInShared>(lent);
    if (best.value - best.value != 0.0f) return best.id;  // nothing is possible, or one token is infinitely likely
    const double temperature = reals[kTemperature], min_p = reals[kMinP], top_p = reals[kTopP];
    const double largest = fabs(static_cast<double>(best.value));
    Weights weights;
    weights.scale = static_cast<float>(min(1.4426950408889634 / temperature, 1e30 / max(largest, 1.0)));
    weights.offset = weights.scale * best.value;
    Cut cut = everything();
    if (min_p > 0) cut.value = __double2float_ru(best.value + temperature * log(min_p));
    const uint64 bits = random_bits(integers[kSeed], number);
    const long long top_k = integers[kTopK];
    const bool has_top_k = top_k > 0 && top_k < width;
    if (has_top_k && top_k <= kMaxBestOfThreads) {
        const Cut least = least_of_best(static_cast<int>(top_k), mine);
        begin_list();
        for_each_of_few(values, width, least, [&](float value, int id) { add_to_list(value, id, 1); });
        __syncthreads();
        const int num_listed = shared.num_listed;
        if (num_listed <= kMaxListed)
            return min(draw_in_list(num_listed, static_cast<int>(top_k), cut, top_p, weights, bits), width - 1);
    }
    if (has_top_k) {
        const Cut other = cut_at<kInShared, false>(lent, width, everything(), weights, static_cast<double>(top_k));
        if (other.value >= cut.value) cut = other;
    }
    if (top_p < 1) cut = cut_at<kInShared, true>(lent, width, cut, weights, top_p);
    const int token = token_at<kInShared, false>(lent, width, cut, weights, 0.0f, bits);
    return token < width ? token : best.id;
}

template <typename T, bool kInShared>
__device__ __forceinline__ void sample_row(
    const T* all_logits, int width, const long long* slots, const long long* numbers, const Tables& tables,
    const long long* order, float* lent, long long* token_ids, double* logprobs, int* top_ids, int max_logprobs) {
    wait_for_previous();
    let_next_begin();
    const long long row = order == nullptr ? blockIdx.x : order[blockIdx.x];
    const T* logits = all_logits + row * width;
    const Pack<T, kWide<T>> first = first_pack(logits, width);
    const int slot = slots[row];
    if (slot < 0) {
        if (threadIdx.x == 0) token_ids[row] = 0;
        return;
    }
    if (threadIdx.x == 0) parameters.point_to(slot, tables);
    const long long* integers = tables.integers + static_cast<long long>(slot) * kNumIntegers;
    const int num_top = integers[kNumLogprobs];
    const bool is_drawn = tables.reals[static_cast<long long>(slot) * kNumReals + kTemperature] > 0;
    const bool is_penalized = integers[kHasPenalties];
    const bool is_held_back = integers[kNumHeldBack] && numbers[row] < integers[kHeldBackUntil];
    const bool is_changed = is_penalized || is_held_back || integers[kNumBiases] || integers[kNumBans];
    if (is_penalized) request_counts(tables.output_counts + static_cast<long long>(slot) * tables.counts_width, width);
    lent += row * ((width + 3) / 4 * 4);
    const bool is_kept = is_drawn || is_changed || num_top >= 0;
    Best mine = load_row(logits, width, first, is_kept ? values_of<kInShared>(lent) : nullptr);
    Best best = best_of_block(mine);
    const float max = best.value;
    double log_sum = 0.0;
    if (num_top >= 0) {
        double* const top = logprobs + row * (1 + max_logprobs) + 1;
        log_sum = score_row<kInShared>(lent, width, num_top, max, mine.value, top, top_ids + row * max_logprobs);
    }
    if (is_changed) {
        mine = adjust_row<kInShared>(lent, width, is_held_back);
        best = best_of_block(mine);
    }
    if (best.id >= width) best.id = 0;
    int token = best.id;
    if (is_drawn) token = draw_token<kInShared>(lent, width, best, mine.value, numbers[row]);
    if (threadIdx.x) return;
    token_ids[row] = token;
    if (is_penalized) {
        short& count = parameters.output_counts[token];
        if (count < 0x7fff) ++count;
    }
    if (num_top >= 0) {
        const float value = to_float(logits[token]);
        logprobs[row * (1 + max_logprobs)] = static_cast<double>(value - max) - log_sum;
    }
}

}  // namespace

#define KERNEL(NAME, T, PLACE, IN_SHARED)                                                                           \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) sample_##NAME##_##PLACE(                                 \
        const T* logits, const long long* slots, const long long* numbers, const long long* order,                  \
        const double* reals, const long long* integers, const int* bias_ids, const double* bias_values,             \
        const int* ban_ids, const unsigned char* prompt_seen, short* output_counts, float* lent,                    \
        long long* token_ids, double* logprobs, int* top_ids, int width, int max_biases, int max_bans,              \
        int seen_bytes, int counts_width, int max_logprobs) {                                                       \
        const Tables tables = {reals, integers, bias_ids, bias_values, ban_ids, prompt_seen, output_counts,         \
                               max_biases, max_bans, seen_bytes, counts_width};                                     \
        sample_row<T, IN_SHARED>(logits, width, slots, numbers, tables, order, lent, token_ids, logprobs, top_ids,  \
                                 max_logprobs);                                                                     \
    }
#define PLACES(NAME, T)           \
    KERNEL(NAME, T, shared, true) \
    KERNEL(NAME, T, lent, false)
FOR_EACH_DTYPE(PLACES)
