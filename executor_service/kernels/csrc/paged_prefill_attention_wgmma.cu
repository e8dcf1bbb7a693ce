// Prefill attention on Hopper: 16-bit types, heads of 64 and 128, blocks of 8, 16, 32, … tokens.
//
// As many thread blocks as multiprocessors take tiles of 128 queries of one head until none is left, the late queries of a
// request first. In each, one warp brings keys and values by tensor copies, one draws the next tile and two more help it to
// bring its queries while this one is worked on, and two warpgroups have 64 queries each. These take turns, after
// FlashAttention-3 (Shah et al., 2024): while the tensor cores have one's products, the other does its softmax.
#include "dependent.cuh"
#include "paged_prefill_attention_feed.cuh"

namespace {

using namespace prefill;

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

// One warpgroup: attention of its half of every tile of queries.
template <typename T, int kDim, bool kSpans> struct Warpgroup {
    using S = Shared<kDim>;
    using Scores = float[kKeys / 2];
    using Weights = unsigned[kKeys / 4];
    using Outputs = float[kDim / 2];
    static constexpr int kSlack = 8;  // binary orders: weights of 256 are exact enough in every type

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
        wait_for_phase(shared.barrier(S::kQueries, slot), number / kSlots & 1);
        return uniform(shared.work(slot));
    }
    __device__ __forceinline__ void wait_for(int which, unsigned number) const {
        wait_for_phase(shared.barrier(which, number % kStages), number / kStages & 1);
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
        wait_for(S::kValuesThere, number);
        issue_weights_times_values<T, kDim>(outputs, weights, shared.values(number % kStages), adds);
    }
    __device__ __forceinline__ void hide(Scores& scores, const Work& work, int tile) const {
        const int position = work.position + first_row, key = tile * kKeys, window = arguments.window;
        if (scaling.inner != 0.0f) cap(scores, scaling.inner);
        if (key + kKeys - 1 > position || (window && key <= position + 15 - window))
            mask<kSpans>(scores, position + lane / 4, key + lane % 4 * 2, window, arguments.visible_ends,
                         work.row + first_row + lane / 4, work.row + work.num_rows);
    }
    // Of the last tile of keys, which comes first.
    __device__ __forceinline__ void first_weights(
        const Work& work, int slot, unsigned count, Scores& scores, Rows& rows, Weights& weights) const {
        float shift[2], corrections[2];
        wait_for(S::kKeysThere, count);
        issue_scores(scores, slot, count);
        wait_for_products<0>();
        settle(scores);
        release(S::kKeysFree, count);
        hide(scores, work, work.highest);
        find_largest<kSlack>(scores, rows, scaling.factor, shift, corrections);
        exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
    }
    // Weights of tile number `count` meet their values, then those of the next one, `tile`, are there.
    __device__ __forceinline__ void next_weights(
        const Work& work, int slot, unsigned count, int tile, Scores& scores, Rows& rows, Weights& weights,
        Outputs& outputs) const {
        float shift[2], corrections[2];
        wait_for(S::kKeysThere, count + 1);
        sync_threads(1 + group, 256);
        issue_scores(scores, slot, count + 1);
        issue_outputs(outputs, weights, count, tile + 1 < work.highest);
        announce_to(2 - group, 256);
        wait_for_products<1>();
        settle(scores);
        release(S::kKeysFree, count + 1);
        hide(scores, work, tile);
        find_largest<kSlack>(scores, rows, scaling.factor, shift, corrections);
        wait_for_products<0>();
        settle(outputs);
        release(S::kValuesFree, count);
        if (__any_sync(kAllLanes, corrections[0] != 1.0f || corrections[1] != 1.0f)) scale_rows(outputs, corrections);
        exponentiate<T>(scores, rows, scaling.factor, shift, corrections, weights);
    }
    __device__ __forceinline__ void store(Outputs& outputs, const Work& work, const Rows& rows, int slot) const {
        float inverse[2];
        reciprocals(rows, inverse);
        scale_rows(outputs, inverse);
        sync_threads(3 + group, 128);  // all four warps are through with the queries
        store_rows<T, kDim>(arguments, work, outputs, shared, slot, first_row);
        if (lane == 0) arrive(shared.barrier(S::kSlotFree, slot));
    }
    __device__ __forceinline__ void run() const {
        if (group == 1) announce_to(1, 256);  // the first warpgroup begins
        Scores scores;
        Weights weights;
        Outputs outputs;
        unsigned count = 0;
        for (unsigned i = 0;; ++i, ++count) {
            const Work work = draw(i);
            const int slot = i % kSlots;
            if (!work.num_rows) return;
            Rows rows;
            first_weights(work, slot, count, scores, rows, weights);
            for (int tile = work.highest - 1; tile >= work.lowest; --tile, ++count)
                next_weights(work, slot, count, tile, scores, rows, weights, outputs);
            issue_outputs(outputs, weights, count, work.highest > work.lowest);
            wait_for_products<0>();
            settle(outputs);
            release(S::kValuesFree, count);
            store(outputs, work, rows, slot);
        }
    }
};

template <typename T, int kDim, bool kSpans>
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
        if (warp == 1) draw_tiles<T, kDim, kSpans>(arguments, shared);
        if (warp >= 2) bring_queries<T, kDim>(arguments, shared, warp - 1);
        let_next_begin();
    } else {
        take_registers<232>();
        Warpgroup<T, kDim, kSpans>(arguments, shared, uniform(role - 1)).run();
    }
}

#endif

}  // namespace

// The shared memory that a launch asks for has 1024 bytes more than is used: atoms are aligned to as many.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RUN(T, DIM, SPANS)                                                                                   \
    run<T, DIM, SPANS>(                                                                                      \
        {&k_map, &v_map, query, block_tables, cu_seqlens, seq_lens, out, num_drawn, num_requests, num_heads, \
         num_kv_heads, block_size, table_stride, scale, window, softcap, visible_ends})
#else
#define RUN(T, DIM, SPANS) __trap()
#endif
#define KERNEL(NAME, T, DIM, SPANS)                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) paged_prefill_attention_wgmma_##NAME(             \
        const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const void* query,    \
        const int* block_tables, const int* cu_seqlens, const int* seq_lens, void* out, int* num_drawn,         \
        int num_requests, int num_heads, int num_kv_heads, int block_size, long long table_stride, float scale, \
        int window, float softcap, const int* visible_ends) {                                                   \
        RUN(T, DIM, SPANS);                                                                                     \
    }
#define KERNELS(NAME, T)                 \
    KERNEL(NAME##_64, T, 64, false)      \
    KERNEL(NAME##_64_spans, T, 64, true) \
    KERNEL(NAME##_128, T, 128, false)    \
    KERNEL(NAME##_128_spans, T, 128, true)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
