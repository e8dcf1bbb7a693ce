// Prefill attention on Hopper: 16-bit types, heads of 64 and 128, blocks of 8, 16, 32, … tokens.
//
// As many thread blocks as processors take tiles of 128 queries of one head until none is left, the late queries of a
// request first. In each, one warp brings keys and values by tensor copies, one warp draws the next tile and brings its
// queries while this one is worked on, and two warpgroups have 64 queries each. After FlashAttention-3 (Shah et al.,
// 2024): while the tensor cores multiply weights by values and queries by the next keys, the softmax of what they left
// goes on.
#include "dependent.cuh"
#include "paged_prefill_attention_feed.cuh"

namespace {

using namespace prefill;

enum Variant { kTakesTurns = 1, kLazy = 4, kOneByOne = 16, kFindsFirst = 32 };

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup's 64 queries x kKeys keys, issued and committed.
template <typename T, int kDim>
__device__ __forceinline__ void issue_query_times_keys(float (&scores)[kKeys / 2], unsigned queries, unsigned keys) {
    using S = Shared<kDim>;
    begin_products();
    const unsigned long long a = descriptor(queries, S::kHalves * S::kAtom, 16);
    const unsigned long long b = descriptor(keys, S::kHalves * S::kAtom, 16);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
        const int offset = (k / 4 * S::kAtom + k % 4 * 32) >> 4;
        multiply_shared(T(), scores, a + offset, b + offset, k > 0);
    }
    commit_products();
}

// outputs (+)= 64 rows of weights x kKeys values, issued and committed.
template <typename T, int kDim>
__device__ __forceinline__ void issue_weights_times_values(
    float (&outputs)[kDim / 2], const unsigned (&weights)[kKeys / 4], unsigned values, bool adds) {
    using S = Shared<kDim>;
    begin_products();
    const unsigned long long b = descriptor(values, S::kHalves * S::kAtom, S::kAtom);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
        multiply_registers(
            T(), outputs, weights + 4 * k, b + (k * 2 * S::kHalves * S::kAtom >> 4), k > 0 || adds);
    commit_products();
}

// A warp's 16 rows through its own part of the queries' shared memory, so that stores are 16 bytes wide.
template <typename T, int kDim>
__device__ __forceinline__ void store_rows(
    const Arguments& arguments, const Work& work, const float (&outputs)[kDim / 2], const Shared<kDim>& shared,
    int slot, int first) {
    using S = Shared<kDim>;
    // Addresses are computed here, not with every tile of keys in case they are needed.
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
        unsigned packed[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) packed[e] = pair<T>(outputs[8 * i + 2 * e], outputs[8 * i + 2 * e + 1]);
        store_matrices(shared.queries(slot) + S::at(first + lane % 16, 2 * i + lane / 16), packed);
    }
    __syncwarp();
    constexpr int kPacks = kDim / 8;
    T* to = static_cast<T*>(arguments.out) + (static_cast<long long>(work.row) * arguments.num_heads + work.head) * kDim;
#pragma unroll
    for (int i = 0; i < 16 * kPacks / 32; ++i) {
        const int row = first + (32 * i + lane) / kPacks, pack = lane % kPacks;
        if (row >= work.num_rows) continue;
        const uint4 content = *reinterpret_cast<const uint4*>(shared.base + slot * S::kTile + S::at(row, pack));
        *reinterpret_cast<uint4*>(to + static_cast<long long>(row) * arguments.num_heads * kDim + pack * 8) = content;
    }
    __syncwarp();
}

// One warpgroup: attention of its half of every tile of queries. Its work is one stream of tiles of keys, also across
// tiles of queries: while the weights of one meet their values, the next is multiplied by its queries and softened.
template <typename T, int kDim, int kVariant> struct Warpgroup {
    using S = Shared<kDim>;
    using Scores = float[kKeys / 2];
    using Weights = unsigned[kKeys / 4];
    using Outputs = float[kDim / 2];

    const Arguments& arguments;
    const S& shared;
    const int group, lane, first_row;
    const Scaling scaling;

    __device__ __forceinline__ Warpgroup(const Arguments& arguments, const S& shared, int group)
        : arguments(arguments), shared(shared), group(group), lane(threadIdx.x % 32),
          first_row(group * 64 + threadIdx.x / 32 % 4 * 16),
          scaling(scaling_of(arguments.scale, arguments.softcap)) {}

    __device__ __forceinline__ Work draw(unsigned number) const {
        const int slot = number % kSlots;
        wait(shared.barrier(S::kQueries, slot), number / kSlots & 1);
        return uniform(shared.work(slot));
    }
    __device__ __forceinline__ void wait_for(int which, unsigned number) const {
        wait(shared.barrier(which, number % kStages), number / kStages & 1);
    }
    __device__ __forceinline__ void release(int which, unsigned number) const {
        __syncwarp();
        if (lane == 0) arrive(shared.barrier(which, number % kStages));
    }
    __device__ __forceinline__ void issue_scores(Scores& scores, int slot, unsigned number) const {
        issue_query_times_keys<T, kDim>(
            scores, shared.queries(slot) + group * 8 * S::kHalves * S::kAtom, shared.keys(number % kStages));
    }
    __device__ __forceinline__ void issue_outputs(
        Outputs& outputs, const Weights& weights, unsigned number, bool adds) const {
        issue_weights_times_values<T, kDim>(outputs, weights, shared.values(number % kStages), adds);
    }
    __device__ __forceinline__ void hide(Scores& scores, int position, int tile) const {
        const int key = tile * kKeys, window = arguments.window;
        position += first_row;
        if (scaling.inner != 0.0f) cap(scores, scaling.inner);
        if (key + kKeys - 1 > position || (window && key <= position + 15 - window))
            mask(scores, position + lane / 4, key + lane % 4 * 2, window);
    }
    __device__ __forceinline__ void find(
        Scores& scores, Rows& rows, float (&shift)[2], float (&corrections)[2], int position, int tile) const {
        hide(scores, position, tile);
        find_largest<kVariant & kLazy ? 8 : 0>(scores, rows, scaling.factor, shift, corrections);
    }
    __device__ __forceinline__ void rescale(Outputs& outputs, const float (&corrections)[2]) const {
        if (!(kVariant & kLazy) || __any_sync(kAllLanes, corrections[0] != 1.0f || corrections[1] != 1.0f))
            scale_rows(outputs, corrections);
    }
    __device__ __forceinline__ void store(Outputs& outputs, const Work& work, const Rows& rows, int slot) const {
        float inverse[2];
        reciprocals(rows, inverse);
        scale_rows(outputs, inverse);
        sync_threads(3 + group, 128);  // all four warps are through with the queries
        store_rows<T, kDim>(arguments, work, outputs, shared, slot, first_row);
        if (lane == 0) arrive(shared.barrier(S::kSlotFree, slot));
    }
    // As `run`, but every tile of queries begins when the one before it has ended.
    __device__ __forceinline__ void run_one_by_one() const {
        if (kVariant & kTakesTurns && group == 1) announce_to(1, 256);
        Scores scores;
        Weights weights;
        Outputs outputs;
        float shift[2], corrections[2];
        unsigned count = 0;
        for (unsigned i = 0;; ++i) {
            const Work work = draw(i);
            if (!work.num_rows) return;
            Rows rows;
            wait_for(S::kKeysThere, count);
            issue_scores(scores, i % kSlots, count);
            wait_for_products<0>();
            settle(scores);
            release(S::kKeysFree, count);
            find(scores, rows, shift, corrections, work.position, work.highest);
            exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
            for (int tile = work.highest - 1; tile >= work.lowest; --tile, ++count) {
                wait_for(S::kKeysThere, count + 1);
                if (kVariant & kTakesTurns) sync_threads(1 + group, 256);
                issue_scores(scores, i % kSlots, count + 1);
                wait_for(S::kValuesThere, count);
                issue_outputs(outputs, weights, count, tile + 1 < work.highest);
                if (kVariant & kTakesTurns) announce_to(2 - group, 256);
                wait_for_products<1>();
                settle(scores);
                release(S::kKeysFree, count + 1);
                find(scores, rows, shift, corrections, work.position, tile);
                if (kVariant & kFindsFirst) finish(shift[0] + shift[1], shared.unread());
                wait_for_products<0>();
                settle(outputs);
                release(S::kValuesFree, count);
                rescale(outputs, corrections);
                exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
            }
            wait_for(S::kValuesThere, count);
            issue_outputs(outputs, weights, count, work.highest > work.lowest);
            wait_for_products<0>();
            settle(outputs);
            release(S::kValuesFree, count);
            ++count;
            store(outputs, work, rows, i % kSlots);
        }
    }
    __device__ __forceinline__ void run() const {
        if constexpr ((kVariant & kOneByOne) != 0) return run_one_by_one();
        if (kVariant & kTakesTurns && group == 1) announce_to(1, 256);
        unsigned num_drawn = 1, count = 0;  // tiles of queries; tiles of keys whose values are through
        Work work = draw(0);
        if (!work.num_rows) return;
        Scores scores;
        Weights weights;
        Outputs outputs;
        Rows rows;
        float shift[2], corrections[2];
        int tile = work.highest;
        wait_for(S::kKeysThere, 0);
        issue_scores(scores, 0, 0);
        wait_for_products<0>();
        settle(scores);
        release(S::kKeysFree, 0);
        find(scores, rows, shift, corrections, work.position, tile);
        exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
        for (bool is_first = true;; ++count) {
            const bool is_last = tile == work.lowest;
            Work next = work;
            if (is_last) {
                next = draw(num_drawn);
                if (!next.num_rows) break;
                ++num_drawn;
            }
            tile = is_last ? next.highest : tile - 1;
            wait_for(S::kKeysThere, count + 1);
            if (kVariant & kTakesTurns) sync_threads(1 + group, 256);
            issue_scores(scores, (num_drawn - 1) % kSlots, count + 1);
            wait_for(S::kValuesThere, count);
            issue_outputs(outputs, weights, count, !is_first);
            if (kVariant & kTakesTurns) announce_to(2 - group, 256);
            wait_for_products<1>();
            settle(scores);
            release(S::kKeysFree, count + 1);
            const Rows finished = rows;
            if (is_last) rows = Rows();
            find(scores, rows, shift, corrections, next.position, tile);
            if (kVariant & kFindsFirst) finish(shift[0] + shift[1], shared.unread());
            wait_for_products<0>();
            settle(outputs);
            release(S::kValuesFree, count);
            if (is_last)
                store(outputs, work, finished, (num_drawn - 2) % kSlots);
            else
                rescale(outputs, corrections);
            exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
            work = next;
            is_first = is_last;
        }
        wait_for(S::kValuesThere, count);
        issue_outputs(outputs, weights, count, work.highest > work.lowest);
        wait_for_products<0>();
        settle(outputs);
        store(outputs, work, rows, (num_drawn - 1) % kSlots);
    }
};

template <typename T, int kDim, int kVariant>
__device__ __forceinline__ void run(const Arguments& arguments) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned start = shared_address(memory), skipped = (1024 - start % 1024) % 1024;
    const Shared<kDim> shared{memory + skipped, start + skipped};
    if (threadIdx.x == 0) {
        shared.init_barriers();
        publish_shared_writes();
    }
    __syncthreads();
    wait_for_previous();
    const int role = threadIdx.x / 128;
    if (role == 0) {
        give_registers<40>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) bring_keys_and_values<kDim>(arguments, shared);
        if (warp == 1) draw_tiles<T, kDim>(arguments, shared);
        if (warp >= 2) bring_queries<T, kDim>(arguments, shared, warp - 1);
        let_next_begin();
    } else {
        take_registers<232>();
        Warpgroup<T, kDim, kVariant>(arguments, shared, uniform(role - 1)).run();
    }
}

#endif

}  // namespace

// The shared memory that a launch asks for has 1024 bytes more than is used: atoms are aligned to as many.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RUN(T, DIM, VARIANT)                                                                                      \
    run<T, DIM, VARIANT>(                                                                                         \
        {&k_map, &v_map, query, block_tables, cu_seqlens, seq_lens, out, num_drawn, num_requests, num_heads,          \
         num_kv_heads, block_size, table_stride, scale, window, softcap, together, lead})
#else
#define RUN(T, DIM, VARIANT) __trap()
#endif
#define KERNEL(NAME, T, DIM, KIND, VARIANT)                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) paged_prefill_attention_wgmma_##NAME##_##DIM##KIND(     \
        const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const void* query,          \
        const int* block_tables, const int* cu_seqlens, const int* seq_lens, void* out, int* num_drawn,               \
        int num_requests, int num_heads, int num_kv_heads, int block_size, long long table_stride, float scale,       \
        int window, float softcap, int together, int lead) {                                                                                  \
        RUN(T, DIM, VARIANT);                                                                                     \
    }
KERNEL(bfloat16, bfloat16, 128, , 5)
KERNEL(bfloat16, bfloat16, 64, , 5)
KERNEL(float16, float16, 128, , 5)
KERNEL(float16, float16, 64, , 5)
KERNEL(bfloat16, bfloat16, 128, _finds, 37)
KERNEL(bfloat16, bfloat16, 128, _one, 21)
KERNEL(bfloat16, bfloat16, 128, _one_finds, 53)
KERNEL(bfloat16, bfloat16, 128, _free, 4)
