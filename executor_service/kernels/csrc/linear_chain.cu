// A decoder layer from what attention gives to the next layer's queries, keys and values, for few rows, in one kernel:
// output, norm, gate and up, down, norm, qkv. The products are those of small_linear_tiles.cu.
//
// Weights depend on nothing, so who asks for them goes from matrix to matrix without a break. Only x has to wait until
// all blocks have stored: they meet by a counter in memory, and meanwhile the rings, which hold some five microseconds
// of weights, fill. Between kernels, blocks end and begin together, and memory has nothing to do for two. A norm is no
// step of its own, which would be another meeting: who stores a row's elements stores them times the norm's weight as
// well, and leaves the sum of their squares; what the next product makes of them is divided by the root of the whole.
// So one rounding is left out, and elements are not yet small when they are rounded: bfloat16 has no need of that.
// Blocks that wait for each other must all be resident: no grid is larger than what fits, and this kernel's blocks are
// there before any of the next kernel's.
#include "dependent.cuh"
#include "early.cuh"
#include "linear_chain.cuh"
#include "linear_chain_parts.cuh"

constexpr int kScaler = kConsumers + 2;  // the warp that finds what a norm divides by
constexpr int kChainThreads = 32 * (kScaler + 1);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace {

// What a norm divides each row by, inverted: from the warp that finds it to the consumers, in shared memory.
template <int kRows> struct Scales {
    float* of;         // [kRows]
    unsigned barrier;  // of one arrival
    unsigned parity;

    __device__ void find(const Link& link, int rows) const {
        for (int row = threadIdx.x % 32; row < rows; row += 32) {
            const float squares = sum_of_parts<kMostParts>(link.squares + row * kMostParts, link.num_parts);
            of[row] = rsqrtf(squares / link.norm_width + link.epsilon);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(barrier);
    }
};

// A product's consumers: they divide by the norm before, and leave what the norm behind takes.
template <typename T, int kRows> struct ChainHooks {
    using Work = Product<T, kRows, false>;
    static constexpr int kOwnRows = Work::Sums::kOwn * 8;  // of x that a block stores
    using Parts = float[kConsumers][kOwnRows];

    const Link& link;
    Scales<kRows>& scales;
    const int rank;
    unsigned factors[4];
    float squares[Work::kChunks] = {};
    bool has_scales = false;

    __device__ ChainHooks(const Link& link, Scales<kRows>& scales, int rank) : link(link), scales(scales), rank(rank) {}

    __device__ void begun(int feature, int end) {
        if (link.norm_weight && feature < end)
            load_words(factors, static_cast<const T*>(link.norm_weight) + feature);
    }

    // Of each group of eight rows a lane has two, of two features.
    template <int kCount> __device__ void added(float (&own)[kCount]) {
        if (!link.squares) return;
        if (!has_scales) {
            wait_for_phase(scales.barrier, scales.parity);
            scales.parity ^= 1;
            has_scales = true;
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            own[i] *= scales.of[(i / 4 * kSplits + rank) * 8 + threadIdx.x % 4 * 2 + i % 2];
    }

    __device__ void stored(const unsigned (&row)[4], int chunk, long long offset) {
        if (!link.norm_weight) return;
        unsigned words[4];
        multiply_words<T>(words, row, factors);
        store_words(static_cast<T*>(link.weighted) + offset, words);
        squares[chunk] += sum_of_squares<T>(row);
    }

    // Behind the last tile, by all consumers. A chunk's four matrices are two times eight features of eight rows.
    __device__ void leave_squares(int rows, Parts& parts) const {
        if (!link.norm_weight) return;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int chunk = 0; chunk < Work::kChunks; ++chunk) {
            const float sum = squares[chunk] + __shfl_xor_sync(0xffffffffu, squares[chunk], 8);
            const int row = chunk * 16 + lane / 16 * 8 + lane % 8;
            if (lane % 16 < 8 && row < kOwnRows) parts[warp][row] = sum;
        }
        asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory");
        const int place = threadIdx.x, row = (place / 8 * kSplits + rank) * 8 + place % 8;
        if (place >= kOwnRows || row >= rows) return;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) sum += parts[i][place];
        link.squares_to[row * kMostParts + blockIdx.x / kSplits] = sum;
    }
};

template <typename T, int kRows>
__device__ __forceinline__ void consume_all(
    const Link* links, int num_links, Room<kRows>& room, int rows, Meeting meeting, Scales<kRows> scales) {
    using Hooks = ChainHooks<T, kRows>;
    __shared__ typename Hooks::Parts parts;
    follow(links, num_links,
           [&](const Link& link) {
               Hooks hooks(link, scales, room.exchange.rank);
               if (link.is_gated) Product<T, kRows, true>(link.task, room, rows).consume(false, hooks);
               else Product<T, kRows, false>(link.task, room, rows).consume(false, hooks);
               hooks.leave_squares(rows, parts);
           },
           [&] {
               meeting.say_stored();
               meeting.hear();
           });
}

template <typename T, int kRows>
__device__ __forceinline__ void produce_weights(const Link* links, int num_links, Room<kRows>& room, int rows) {
    for (int i = 0; i < num_links; ++i) {
        const Link link = links[i];
        if (i + 1 < num_links) bring_maps_near(links[i + 1].task);
        if (link.is_gated) Product<T, kRows, true>(link.task, room, rows).produce_weights();
        else Product<T, kRows, false>(link.task, room, rows).produce_weights();
    }
}

template <typename T, int kRows>
__device__ __forceinline__ void produce_inputs(
    const Link* links, int num_links, Room<kRows>& room, int rows, Meeting meeting) {
    follow(links, num_links,
           [&](const Link& link) {
               if (link.is_gated) Product<T, kRows, true>(link.task, room, rows).produce_inputs();
               else Product<T, kRows, false>(link.task, room, rows).produce_inputs();
           },
           [&] {
               meeting.speak();
               meeting.hear();
           });
    meeting.leave();
}

template <int kRows>
__device__ __forceinline__ void find_scales(
    const Link* links, int num_links, int rows, Meeting meeting, const Scales<kRows>& scales) {
    follow(links, num_links,
           [&](const Link& link) {
               if (link.squares) scales.find(link, rows);
           },
           [&] { meeting.hear(); });
}

// Norms' weights to the L2 cache, which nothing has read for a layer's time: a line each.
template <typename T> __device__ __forceinline__ void bring_norms_near(const Link* links, int num_links) {
    constexpr int kLine = 128 / sizeof(T);
    const int at = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32) * kLine;
    for (int i = 0; i < num_links; ++i) {
        const T* weight = static_cast<const T*>(links[i].norm_weight);
        if (weight && at < links[i].task.features) bring_near(weight + at);
    }
}

template <typename T, int kRows>
__device__ __forceinline__ void run(
    const Link* links, int num_links, int rows, int num_stages, int num_x_stages, unsigned* arrivals) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ float scales_of[kRows];
    const int warp = threadIdx.x / 32;
    Room<kRows> room((shared_address(shared) + 1023) / 1024 * 1024, rows, num_stages, num_x_stages);
    const Meeting meeting{room.end, room.end + 8, arrivals, 0, 0};
    const Scales<kRows> scales{scales_of, room.end + 16, 0};
    if (warp == kConsumers && elect()) {
        bring_maps_near(links[0].task);
        room.init();
        meeting.init();
        init_barrier(scales.barrier, 1);
        publish_barriers();
    }
    __syncthreads();
    arrive_at_cluster();
    if (warp < kConsumers) {
        wait_for_cluster();
        wait_for_previous();
        consume_all<T>(links, num_links, room, rows, meeting, scales);
    } else {
        if (warp == kConsumers) {
            if (elect()) produce_weights<T>(links, num_links, room, rows);
        } else if (warp == kScaler) {
            bring_norms_near<T>(links, num_links);
            wait_for_previous();
            find_scales(links, num_links, rows, meeting, scales);
        } else {
            wait_for_previous();
            if (elect()) produce_inputs<T>(links, num_links, room, rows, meeting);
        }
        __syncwarp();
        wait_for_cluster();
    }
    // A block's sums and barriers are there until the other has written to them for the last time.
    __syncwarp();
    arrive_at_cluster();
    wait_for_cluster();
}

}  // namespace
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Links lie in shared memory, where a loop can find them by number.
#define RUN(T, ROWS)                                                                                                  \
    __shared__ Link links[kMostLinks];                                                                                \
    let_next_begin();                                                                                                 \
    if (threadIdx.x == 0) {                                                                                           \
        float* next_squares = squares + rows * kMostParts;                                                            \
        const void* last_norm = num_links == kMostLinks ? next_norm : nullptr;                                        \
        links[0] = {{&w0, &r0, &x0, nullptr, residual, middle, features0, range0, steps0},                            \
                    false, nullptr, 0, 0, 0, mlp_norm, weighted, squares};                                            \
        links[1] = {{&w1, &r1, &x1, nullptr, nullptr, inner, features1, range1, steps1},                              \
                    true, squares, parts0, features0, mlp_epsilon, nullptr, nullptr, nullptr};                        \
        links[2] = {{&w2, &r2, &x2, nullptr, middle, out, features2, range2, steps2},                                 \
                    false, nullptr, 0, 0, 0, last_norm, next_weighted, next_squares};                                 \
        links[3] = {{&w3, &r3, &x3, bias, nullptr, qkv, features3, range3, steps3},                                   \
                    false, next_squares, parts2, features2, next_epsilon, nullptr, nullptr, nullptr};                 \
    }                                                                                                                 \
    __syncthreads();                                                                                                  \
    run<T, ROWS>(links, num_links, rows, num_stages, num_x_stages, arrivals)
#else
#define RUN(T, ROWS) __trap()
#endif
#define MAPS(N)                                                                     \
    const __grid_constant__ TensorMap w##N, const __grid_constant__ TensorMap r##N, \
        const __grid_constant__ TensorMap x##N
#define NUMBERS(N) int features##N, int range##N, int steps##N
#define KERNEL(ROWS)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(kChainThreads, 1) linear_chain_bfloat16_##ROWS(                      \
        MAPS(0), MAPS(1), MAPS(2), MAPS(3), const void* residual, const void* mlp_norm, const void* next_norm,        \
        const void* bias, void* middle, void* weighted, void* inner, void* out, void* next_weighted, void* qkv,       \
        float* squares, unsigned* arrivals, float mlp_epsilon, float next_epsilon, NUMBERS(0), NUMBERS(1),            \
        NUMBERS(2), NUMBERS(3), int parts0, int parts2, int num_links, int rows, int num_stages, int num_x_stages) {  \
        RUN(bfloat16, ROWS);                                                                                          \
    }
KERNEL(16)
KERNEL(32)
KERNEL(64)
