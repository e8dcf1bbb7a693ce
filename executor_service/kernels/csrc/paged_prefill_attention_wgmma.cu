// Prefill attention on Hopper: 16-bit types, heads of 64 and 128, blocks of 8, 16, 32, … tokens.
//
// As many thread blocks as processors take tiles of 128 queries of one head until none is left, the late queries of a
// request first. In each, one warp brings keys and values by tensor copies, one warp draws the next tile and brings its
// queries while this one is worked on, and two warpgroups have 64 queries each. After FlashAttention-3 (Shah et al.,
// 2024): while the tensor cores multiply weights by values and queries by the next keys, the softmax of what they left
// goes on.
#include "dependent.cuh"
#include "paged_prefill_attention_wgmma.cuh"

namespace {

constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kThreads = 128 * (1 + kGroups);
enum Variant { kTakesTurns = 1, kFinishes = 2, kLazy = 4, kOneByOne = 16, kFindsFirst = 32 };

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

struct Arguments {
    const TensorMap *k_map, *v_map;
    const void* query;
    const int *block_tables, *cu_seqlens, *seq_lens;
    void* out;
    int* num_drawn;  // 0 before and after
    int num_requests, num_heads, num_kv_heads, block_size;
    long long table_stride;
    float scale;
    int window;
    float softcap;
    int together, lead;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

using namespace prefill;

constexpr int kRows = 64 * kGroups;  // queries of a tile
constexpr int kKeys = 128;           // keys of a tile
constexpr int kStages = 2;           // tiles of keys, and of values, in shared memory
constexpr int kSlots = 2;            // tiles of queries there: one in work, one to come
constexpr int kQueryWarps = 3;       // bring them

// A tile of queries of one head, and the tiles of keys that it sees. No rows: there is nothing left to do.
struct Work {
    int request, head, row, num_rows, position, lowest, highest, length;
};

// Shared memory: queries, keys and values in atoms of 8 tokens x 64 elements, a token's halves beside each other.
template <int kDim> struct Shared {
    static constexpr int kHalves = kDim / 64;
    static constexpr int kAtom = 1024;
    static constexpr int kTile = 128 * kDim * 2;
    enum Barrier { kWork, kQueries = 2, kSlotFree = 4, kKeysThere = 6, kValuesThere = 8, kKeysFree = 10,
                   kValuesFree = 12, kTail = 14, kNearlyDone = 15 };

    unsigned char* base;
    unsigned address;

    __device__ __forceinline__ unsigned queries(int slot) const { return address + slot * kTile; }
    __device__ __forceinline__ unsigned keys(int stage) const { return address + (kSlots + stage) * kTile; }
    __device__ __forceinline__ unsigned values(int stage) const { return keys(kStages + stage); }
    __device__ __forceinline__ unsigned barrier(int which, int index = 0) const {
        return address + (2 * kStages + kSlots) * kTile + 8 * (which + index);
    }
    __device__ __forceinline__ Work& work(int slot) const {
        return reinterpret_cast<Work*>(base + (2 * kStages + kSlots) * kTile + 128)[slot];
    }
    __device__ __forceinline__ unsigned unread() const { return barrier(0) + 128 + kSlots * sizeof(Work); }
    // Where the 16-byte pack of a row lies in a tile.
    static __device__ __forceinline__ int at(int row, int pack) {
        return (row / 8 * kHalves + pack / 8) * kAtom + row % 8 * 128 + (pack % 8 ^ row % 8) * 16;
    }
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < 2; ++i) {
            init_barrier(barrier(kWork, i), 1);
            init_barrier(barrier(kQueries, i), kQueryWarps);
            init_barrier(barrier(kSlotFree, i), 1 + 4 * kGroups);
            init_barrier(barrier(kKeysThere, i), 1);
            init_barrier(barrier(kValuesThere, i), 1);
            init_barrier(barrier(kKeysFree, i), 4 * kGroups);
            init_barrier(barrier(kValuesFree, i), 4 * kGroups);
        }
        init_barrier(barrier(kTail), 1);
        init_barrier(barrier(kNearlyDone), 1);
    }
};

// The compiler does not know that what lies in shared memory is the same for all lanes, and keeps it in uniform registers,
// where products want the places of their operands, only if it does.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(kAllLanes, value, 0); }

__device__ __forceinline__ Work uniform(const Work& work) {
    return {uniform(work.request),  uniform(work.head),   uniform(work.row),     uniform(work.num_rows),
            uniform(work.position), uniform(work.lowest), uniform(work.highest), uniform(work.length)};
}

// Draws tiles of queries, for a whole warp. Tickets are in the order of groups of kTogether requests, whose keys and
// values the L2 cache holds, and in a group the tiles that see most come first. A thread block's tickets grow, so
// requests that are behind one are behind all later ones.
struct Drawing {
    static constexpr int kTogether = 4;  // at most

    int ticket = blockIdx.x;
    int first_request = 0, num_before = 0;  // tiles of the requests before it

    // The tile of `ticket`; without rows if there are fewer.
    __device__ __forceinline__ Work tile(const Arguments& arguments) {
        const int lane = threadIdx.x % 32, number = ticket / arguments.num_heads;
        for (; first_request < arguments.num_requests; first_request += 32 * arguments.together) {
            int counts[kTogether], until = 0;
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int request = first_request + lane * arguments.together + i;
                counts[i] = i < arguments.together && request < arguments.num_requests
                                ? (arguments.cu_seqlens[request + 1] - arguments.cu_seqlens[request] + kRows - 1) / kRows
                                : 0;
                until += counts[i];
            }
            const int own = until;
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(kAllLanes, until, offset);
                if (lane >= offset) until += other;
            }
            until += num_before;
            const unsigned found = __ballot_sync(kAllLanes, until > number);
            if (found) {
                const int from = __ffs(found) - 1;
#pragma unroll
                for (int i = 0; i < kTogether; ++i) counts[i] = __shfl_sync(kAllLanes, counts[i], from);
                const int index = number - __shfl_sync(kAllLanes, until - own, from);
                return tile_of_group(arguments, first_request + from * arguments.together, counts, index);
            }
            num_before = __shfl_sync(kAllLanes, until, 31);
        }
        return {};
    }
    // Number `index` of the tiles that a group's requests have, by descending place in their chunks.
    __device__ __forceinline__ Work tile_of_group(
        const Arguments& arguments, int request, const int (&counts)[kTogether], int index) const {
        int tile = 0, before = 0;
        for (int above = max(max(counts[0], counts[1]), max(counts[2], counts[3])); above > 0; above -= 32) {
            const int own = max(above - 1 - static_cast<int>(threadIdx.x % 32), 0);
            int until = 0, here = 0;
#pragma unroll
            for (int count : counts) until += max(count - own, 0), here += count > own;
            const unsigned found = __ballot_sync(kAllLanes, until > index);
            if (!found) continue;
            tile = __shfl_sync(kAllLanes, own, __ffs(found) - 1);
            before = __shfl_sync(kAllLanes, until - here, __ffs(found) - 1);
            break;
        }
        index -= before;
        int which = 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
            if (counts[i] > tile && index-- == 0) which = i;
        request += which;
        const Chunk chunk = chunk_of(arguments.cu_seqlens, arguments.seq_lens, request);
        const int first = tile * kRows, num_rows = min(kRows, chunk.count - first);
        const int position = chunk.length - chunk.count + first;
        return {request, ticket % arguments.num_heads, chunk.begin + first, num_rows, position,
                first_key(position, arguments.window) / kKeys, (position + num_rows - 1) / kKeys, chunk.length};
    }
    __device__ __forceinline__ void draw(int* num_drawn) {
        if (threadIdx.x % 32 == 0) ticket = gridDim.x + atomicAdd(num_drawn, 1);
        ticket = __shfl_sync(kAllLanes, ticket, 0);
    }
    // After the end was found. Every thread block draws in vain once; whoever does so last puts the count back.
    __device__ __forceinline__ void end(const Arguments& arguments, bool has_drawn) {
        if (!has_drawn) draw(arguments.num_drawn);
        const int num_blocks = gridDim.x, num_tickets = num_before * arguments.num_heads;
        if (threadIdx.x % 32 == 0 && ticket - num_blocks == max(num_tickets - num_blocks, 0) + num_blocks - 1)
            *arguments.num_drawn = 0;
    }
};

// One of kQueryWarps warps, each of which has the same pack of every so many rows.
template <typename T, int kDim>
__device__ __forceinline__ void copy_queries(const Arguments& arguments, const Work& work, unsigned to, int warp) {
    constexpr int kPacks = kDim / 8, kRowsAtOnce = 32 / kPacks;
    const int lane = threadIdx.x % 32, pack = lane % kPacks, row_stride = arguments.num_heads * kDim;
    const T* from = static_cast<const T*>(arguments.query) +
                    (static_cast<long long>(work.row) * arguments.num_heads + work.head) * kDim + pack * 8;
#pragma unroll 8
    for (int row = warp * kRowsAtOnce + lane / kPacks; row < kRows; row += kQueryWarps * kRowsAtOnce) {
        const bool valid = row < work.num_rows;
        copy_async(
            to + Shared<kDim>::at(row, pack), from + static_cast<long long>(valid ? row : 0) * row_stride, valid);
    }
    wait_for_copies();
    publish_shared_writes();
}

// The first of the warps that bring queries: says what to do next.
template <typename T, int kDim>
__device__ __forceinline__ void draw_tiles(const Arguments& arguments, const Shared<kDim>& shared) {
    using S = Shared<kDim>;
    const bool leads = threadIdx.x % 32 == 0;
    Drawing drawing;
    for (unsigned i = 0;; ++i) {
        const int slot = i % kSlots;
        // Not sooner than its keys can be asked for: until then others may run out of work.
        if (i > 0) {
            wait(shared.barrier(S::kNearlyDone), i & 1 ^ 1);
            drawing.draw(arguments.num_drawn);
        }
        const Work work = drawing.tile(arguments);
        wait(shared.barrier(S::kSlotFree, slot), (i / kSlots & 1) ^ 1);
        if (leads) {
            shared.work(slot) = work;
            arrive(shared.barrier(S::kWork, slot));
        }
        if (work.num_rows) copy_queries<T, kDim>(arguments, work, shared.queries(slot), 0);
        __syncwarp();
        if (leads) arrive(shared.barrier(S::kQueries, slot));
        if (!work.num_rows) return drawing.end(arguments, i > 0);
    }
}

// The others: they go along.
template <typename T, int kDim>
__device__ __forceinline__ void bring_queries(const Arguments& arguments, const Shared<kDim>& shared, int warp) {
    using S = Shared<kDim>;
    for (unsigned i = 0;; ++i) {
        const int slot = i % kSlots;
        wait(shared.barrier(S::kWork, slot), i / kSlots & 1);
        const Work work = shared.work(slot);
        if (work.num_rows) copy_queries<T, kDim>(arguments, work, shared.queries(slot), warp);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(shared.barrier(S::kQueries, slot));
        if (!work.num_rows) return;
    }
}

// The rows of a tile from `first` on become zeros: whatever lies in the cache behind a request's last token, it must not
// meet a weight of zero.
template <int kDim> __device__ __forceinline__ void clear_rows(unsigned tile, int first) {
    constexpr int kPacks = kDim / 8;
    for (int i = first * kPacks + static_cast<int>(threadIdx.x) % 32; i < kKeys * kPacks; i += 32)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + Shared<kDim>::at(i / kPacks, i % kPacks)),
                     "r"(0)
                     : "memory");
    publish_shared_writes();
    __syncwarp();
}

// One warp: keys and values of every tile. Each lane has a box of one block's tokens.
template <int kDim>
__device__ __forceinline__ void bring_keys_and_values(const Arguments& arguments, const Shared<kDim>& shared) {
    using S = Shared<kDim>;
    const int lane = threadIdx.x % 32, block_size = arguments.block_size;
    const int box = min(block_size, kKeys), box_bytes = box * kDim * 2;
    unsigned count = 0, tail_parity = 0;
    for (unsigned i = 0;; ++i) {
        const int slot = i % kSlots;
        wait(shared.barrier(S::kWork, slot), i / kSlots & 1);
        const Work work = shared.work(slot);
        __syncwarp();
        if (lane == 0) arrive(shared.barrier(S::kSlotFree, slot));
        if (!work.num_rows) return;
        const int* table = arguments.block_tables + work.request * arguments.table_stride;
        const int kv_head = work.head / (arguments.num_heads / arguments.num_kv_heads);
        const auto block_of = [&](int tile) {
            const int token = tile * kKeys + lane * box;
            return lane * box < kKeys && token >= 0 && token < work.length ? table[token / block_size] : 0;
        };
        int block = block_of(work.highest);
        for (int tile = work.highest; tile >= work.lowest; --tile, ++count) {
            if (tile == min(work.highest, work.lowest + arguments.lead) && lane == 0) arrive(shared.barrier(S::kNearlyDone));
            const int stage = count % kStages, free_parity = (count / kStages & 1) ^ 1;
            const int num_tokens = min(work.length - tile * kKeys, kKeys), num_boxes = (num_tokens + box - 1) / box;
            const int group = block * (block_size / 8) + tile * kKeys % block_size / 8;
            block = block_of(tile - 1);
            const auto bring = [&](const TensorMap* map, unsigned to, unsigned barrier) {
                if (lane == 0) arrive_expecting(barrier, num_boxes * box_bytes);
                __syncwarp();
                if (lane < num_boxes) copy_box(to + lane * box_bytes, map, kv_head, group, barrier);
            };
            wait(shared.barrier(S::kKeysFree, stage), free_parity);
            bring(arguments.k_map, shared.keys(stage), shared.barrier(S::kKeysThere, stage));
            wait(shared.barrier(S::kValuesFree, stage), free_parity);
            if (num_tokens == kKeys) {
                bring(arguments.v_map, shared.values(stage), shared.barrier(S::kValuesThere, stage));
            } else {
                bring(arguments.v_map, shared.values(stage), shared.barrier(S::kTail));
                wait(shared.barrier(S::kTail), tail_parity);
                tail_parity ^= 1;
                clear_rows<kDim>(shared.values(stage), num_tokens);
                if (lane == 0) arrive(shared.barrier(S::kValuesThere, stage));
            }
        }
    }
}

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
    const int lane = threadIdx.x % 32;
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
    __device__ __forceinline__ void soften(
        Scores& scores, Rows& rows, float (&corrections)[2], int position, int tile, bool waits) const {
        float shift[2];
        hide(scores, position, tile);
        find_largest<kVariant & kLazy ? 8 : 0>(scores, rows, scaling.factor, shift, corrections);
        if (waits && (kVariant & kFindsFirst)) {
            finish(shift[0] + shift[1], shared.unread());
            wait_for_products<0>();
        }
        exponentiate(scores, rows, scaling.factor, shift, corrections);
        if (waits && (kVariant & kFinishes)) finish(rows.sum[0] + rows.sum[1], shared.unread());
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
        float corrections[2];
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
            soften(scores, rows, corrections, work.position, work.highest, false);
            to_operand<T>(scores, weights);
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
                soften(scores, rows, corrections, work.position, tile, true);
                wait_for_products<0>();
                settle(outputs);
                release(S::kValuesFree, count);
                if (!(kVariant & kLazy) || __any_sync(kAllLanes, corrections[0] != 1.0f || corrections[1] != 1.0f))
                    scale_rows(outputs, corrections);
                to_operand<T>(scores, weights);
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
        float corrections[2];
        int tile = work.highest;
        wait_for(S::kKeysThere, 0);
        issue_scores(scores, 0, 0);
        wait_for_products<0>();
        settle(scores);
        release(S::kKeysFree, 0);
        soften(scores, rows, corrections, work.position, tile, false);
        to_operand<T>(scores, weights);
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
            soften(scores, rows, corrections, next.position, tile, true);
            wait_for_products<0>();
            settle(outputs);
            release(S::kValuesFree, count);
            if (is_last)
                store(outputs, work, finished, num_drawn % kSlots);
            else if (!(kVariant & kLazy) || __any_sync(kAllLanes, corrections[0] != 1.0f || corrections[1] != 1.0f))
                scale_rows(outputs, corrections);
            to_operand<T>(scores, weights);
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
KERNEL(bfloat16, bfloat16, 128, _finishes, 7)
KERNEL(bfloat16, bfloat16, 128, _one, 21)
KERNEL(bfloat16, bfloat16, 128, _one_finds, 53)
KERNEL(bfloat16, bfloat16, 128, _free, 4)
KERNEL(bfloat16, bfloat16, 128, _free_finds, 36)
