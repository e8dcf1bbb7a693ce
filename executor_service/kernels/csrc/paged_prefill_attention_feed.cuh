// What feeds the computing warps of prefill attention on Hopper: which tile of queries comes next, its queries, and the
// keys and values that they see, in shared memory.
#pragma once
#include "paged_prefill_attention_wgmma.cuh"

namespace prefill {

constexpr int kGroups = 2;  // warpgroups that compute
constexpr int kThreads = 128 * (1 + kGroups);

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
    const int* visible_ends;  // of no use without spans
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kRows = 64 * kGroups;  // queries of a tile
constexpr int kKeys = 128;           // keys of a tile
constexpr int kStages = 2;           // tiles of keys, and of values, in shared memory
constexpr int kSlots = 2;            // tiles of queries there: one in work, one to come
constexpr int kQueryWarps = 3;       // bring them
constexpr int kLead = 2;             // tiles of keys not yet asked for when the next tile of queries is drawn

// A tile of queries of one head, and the tiles of keys that it sees. No rows: there is nothing left to do.
struct Work {
    int request, head, row, num_rows, position, lowest, highest, length;
};

// Shared memory: queries, keys and values in atoms of 8 tokens x 64 elements, a token's halves beside each other.
template <int kDim> struct Shared {
    static constexpr int kHalves = kDim / 64;
    static constexpr int kAtom = 1024;
    static constexpr int kTile = 128 * kDim * 2;
    enum Barrier {
        kWork = 0,
        kQueries = kWork + kSlots,
        kSlotFree = kQueries + kSlots,
        kKeysThere = kSlotFree + kSlots,
        kValuesThere = kKeysThere + kStages,
        kKeysFree = kValuesThere + kStages,
        kValuesFree = kKeysFree + kStages,
        kTail = kValuesFree + kStages,
        kNearlyDone,
        kNumBarriers
    };
    static constexpr int kBarriers = (2 * kStages + kSlots) * kTile;
    static constexpr int kWorks = kBarriers + (8 * kNumBarriers + 15) / 16 * 16;

    unsigned char* base;
    unsigned address;

    __device__ __forceinline__ unsigned queries(int slot) const { return address + slot * kTile; }
    __device__ __forceinline__ unsigned keys(int stage) const { return address + (kSlots + stage) * kTile; }
    __device__ __forceinline__ unsigned values(int stage) const { return keys(kStages + stage); }
    __device__ __forceinline__ unsigned barrier(int which, int index = 0) const {
        return address + kBarriers + 8 * (which + index);
    }
    __device__ __forceinline__ Work& work(int slot) const {
        return reinterpret_cast<Work*>(base + kWorks)[slot];
    }
    // Where the 16-byte pack of a row lies in a tile.
    static __device__ __forceinline__ int at(int row, int pack) {
        return (row / 8 * kHalves + pack / 8) * kAtom + row % 8 * 128 + (pack % 8 ^ row % 8) * 16;
    }
    __device__ __forceinline__ void init_barriers() const {
        for (int i = 0; i < kSlots; ++i) {
            init_barrier(barrier(kWork, i), 1);
            init_barrier(barrier(kQueries, i), kQueryWarps);
            init_barrier(barrier(kSlotFree, i), 1 + 4 * kGroups);
        }
        for (int i = 0; i < kStages; ++i) {
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

// Draws tiles of queries, for a whole warp: one request after the other, whose keys and values the L2 cache then holds, and
// of each the tiles that see most first. Tickets grow, so requests that are behind one are behind all later ones.
struct Drawing {
    int ticket = blockIdx.x;
    int first_request = 0, num_before = 0;  // tiles of the requests before it

    // The tile of `ticket`; without rows if there are fewer.
    template <bool kSpans>
    __device__ __forceinline__ Work tile(const Arguments& arguments) {
        const int lane = threadIdx.x % 32, number = ticket / arguments.num_heads;
        for (; first_request < arguments.num_requests; first_request += 32) {
            const int request = first_request + lane;
            Chunk chunk{0, 0, 0};
            if (request < arguments.num_requests) chunk = chunk_of(arguments.cu_seqlens, arguments.seq_lens, request);
            int until = (chunk.count + kRows - 1) / kRows;
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(kAllLanes, until, offset);
                if (lane >= offset) until += other;
            }
            until += num_before;
            const unsigned found = __ballot_sync(kAllLanes, until > number);
            if (found) {
                const int from = __ffs(found) - 1;
                const auto its = [&](int value) { return __shfl_sync(kAllLanes, value, from); };
                return tile_of<kSpans>(arguments, its(request),
                                       {its(chunk.begin), its(chunk.count), its(chunk.length)},
                                       its(until) - 1 - number);
            }
            num_before = __shfl_sync(kAllLanes, until, 31);
        }
        return {};
    }
    template <bool kSpans>
    __device__ __forceinline__ Work tile_of(
        const Arguments& arguments, int request, const Chunk& chunk, int tile) const {
        const int first = tile * kRows, num_rows = min(kRows, chunk.count - first);
        const int position = chunk.length - chunk.count + first, row = chunk.begin + first;
        const int last = last_key<kSpans>(arguments.visible_ends, row + num_rows - 1, position + num_rows - 1);
        return {request, ticket % arguments.num_heads, row, num_rows, position,
                first_key(position, arguments.window) / kKeys, last / kKeys, chunk.length};
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
template <typename T, int kDim, bool kSpans>
__device__ __forceinline__ void draw_tiles(const Arguments& arguments, const Shared<kDim>& shared) {
    using S = Shared<kDim>;
    const bool leads = threadIdx.x % 32 == 0;
    Drawing drawing;
    for (unsigned i = 0;; ++i) {
        const int slot = i % kSlots;
        // Not much sooner than its keys can be asked for: until then others may run out of work.
        if (i > 0) {
            wait_for_phase(shared.barrier(S::kNearlyDone), i & 1 ^ 1);
            drawing.draw(arguments.num_drawn);
        }
        const Work work = drawing.tile<kSpans>(arguments);
        wait_for_phase(shared.barrier(S::kSlotFree, slot), (i / kSlots & 1) ^ 1);
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
        wait_for_phase(shared.barrier(S::kWork, slot), i / kSlots & 1);
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
        wait_for_phase(shared.barrier(S::kWork, slot), i / kSlots & 1);
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
            if (lane == 0 && tile == min(work.highest, work.lowest + kLead)) arrive(shared.barrier(S::kNearlyDone));
            const int stage = count % kStages, free_parity = (count / kStages & 1) ^ 1;
            const int num_tokens = min(work.length - tile * kKeys, kKeys), num_boxes = (num_tokens + box - 1) / box;
            const int group = block * (block_size / 8) + tile * kKeys % block_size / 8;
            block = block_of(tile - 1);
            const auto bring = [&](const TensorMap* map, unsigned to, unsigned barrier) {
                if (lane == 0) arrive_expecting(barrier, num_boxes * box_bytes);
                __syncwarp();
                if (lane < num_boxes) copy_box(to + lane * box_bytes, map, kv_head, group, barrier);
            };
            wait_for_phase(shared.barrier(S::kKeysFree, stage), free_parity);
            bring(arguments.k_map, shared.keys(stage), shared.barrier(S::kKeysThere, stage));
            wait_for_phase(shared.barrier(S::kValuesFree, stage), free_parity);
            if (num_tokens == kKeys) {
                bring(arguments.v_map, shared.values(stage), shared.barrier(S::kValuesThere, stage));
            } else {
                bring(arguments.v_map, shared.values(stage), shared.barrier(S::kTail));
                wait_for_phase(shared.barrier(S::kTail), tail_parity);
                tail_parity ^= 1;
                clear_rows<kDim>(shared.values(stage), num_tokens);
                if (lane == 0) arrive(shared.barrier(S::kValuesThere, stage));
            }
        }
    }
}

#endif

}  // namespace prefill
