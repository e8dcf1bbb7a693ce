// A decoder layer from what attention gives to the next layer's queries, keys and values, for few rows, in one kernel:
// output, norm, gate and up, down, norm, qkv. The products are those of small_linear_tiles.cu, to the bit.
//
// Weights depend on nothing, so who asks for them goes from matrix to matrix without a break. Only x has to wait until
// all blocks have stored: they meet by a counter in memory, and meanwhile the rings, which hold some five microseconds
// of weights, fill. Between kernels, blocks end and begin together, and memory has nothing to do for two. A norm is no
// step of its own: who stores a row's elements adds up their squares, who loads them next divides. Blocks that wait for
// each other must all be resident: no grid is larger than what fits, and this kernel's blocks are there before any of
// the next kernel's.
#include "dependent.cuh"
#include "early.cuh"
#include "linear_chain_parts.cuh"
#include "small_linear_parts.cuh"

#include "linear_chain.cuh"

constexpr int kChainThreads = 32 * (kConsumers + 1 + kLoaders);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace {

// A plain product's consumers: what they store, and their part of its rows' squares.
template <typename T, int kRows> struct PlainConsumer {
    using Work = Product<T, kRows, false>;
    static constexpr int kOwnRows = Work::Sums::kOwn * 8;  // of x that a block stores

    float squares[Work::kChunks] = {};

    __device__ void consume(const Link& link, Room<kRows>& room, int rows, float (*parts)[kOwnRows]) {
        Work work(link.task, room, rows);
        if (!link.squares_to) return work.consume(false, [](const unsigned (&)[4], int) {});
        work.consume(false, [&](const unsigned (&row)[4], int chunk) { squares[chunk] += sum_of_squares<T>(row); });
        share(parts);
        give(link, room.exchange.rank, rows, parts);
    }

    // A chunk's four matrices are two times eight features of eight rows, of two groups of rows.
    __device__ void share(float (*parts)[kOwnRows]) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
        for (int chunk = 0; chunk < Work::kChunks; ++chunk) {
            const float sum = squares[chunk] + __shfl_xor_sync(0xffffffffu, squares[chunk], 8);
            const int row = chunk * 16 + lane / 16 * 8 + lane % 8;
            if (lane % 16 < 8 && row < kOwnRows) parts[warp][row] = sum;
        }
    }

    __device__ static void give(const Link& link, int rank, int rows, float (*parts)[kOwnRows]) {
        asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory");
        const int place = threadIdx.x, cluster = static_cast<int>(blockIdx.x) / kSplits;
        const int row = (place / 8 * kSplits + rank) * 8 + place % 8;
        if (place >= kOwnRows || row >= rows || cluster >= kMostParts) return;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kConsumers; ++warp) sum += parts[warp][place];
        link.squares_to[row * kMostParts + cluster] = sum;
    }
};

template <typename T, int kRows>
__device__ __forceinline__ void consume_all(
    const Link* links, int num_links, Room<kRows>& room, int rows, Meeting meeting) {
    using Consumer = PlainConsumer<T, kRows>;
    __shared__ float parts[kConsumers][Consumer::kOwnRows];
    follow(links, num_links,
           [&](const Link& link) {
               if (link.is_gated)
                   Product<T, kRows, true>(link.task, room, rows).consume(false, [](const unsigned (&)[4], int) {});
               else Consumer().consume(link, room, rows, parts);
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
    const bool is_clerk = threadIdx.x == 32 * (kConsumers + 1);
    follow(links, num_links, [&](const Link& link) { Inputs<T, kRows>(link, room, rows).produce(); },
           [&] {
               if (is_clerk) meeting.speak();
               __syncwarp();
               meeting.hear();
           });
    if (is_clerk) meeting.leave();
}

// Norms' weights to the L2 cache, which nothing has read for a layer's time.
template <typename T> __device__ __forceinline__ void bring_norms_near(const Link* links, int num_links) {
    constexpr int kLine = 128 / sizeof(T);
    for (int i = blockIdx.x; i < num_links; i += gridDim.x) {
        const T* weight = static_cast<const T*>(links[i].norm_weight);
        if (!weight) continue;
        for (int at = threadIdx.x % (32 * kLoaders) * kLine; at < links[i].width; at += 32 * kLoaders * kLine)
            bring_near(weight + at);
    }
}

template <typename T, int kRows>
__device__ __forceinline__ void run(
    const Link* links, int num_links, int rows, int num_stages, int num_x_stages, unsigned* arrivals) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int warp = threadIdx.x / 32;
    Room<kRows> room((shared_address(shared) + 1023) / 1024 * 1024, rows, num_stages, num_x_stages);
    const Meeting meeting{room.end, room.end + 8, arrivals, 0, 0};
    if (warp == kConsumers && elect()) {
        bring_maps_near(links[0].task);
        room.init(kLoaders);
        meeting.init();
        publish_barriers();
    }
    __syncthreads();
    arrive_at_cluster();
    if (warp < kConsumers) {
        wait_for_cluster();
        wait_for_previous();
        consume_all<T>(links, num_links, room, rows, meeting);
    } else if (warp == kConsumers) {
        if (elect()) produce_weights<T>(links, num_links, room, rows);
        __syncwarp();
        wait_for_cluster();
    } else {
        bring_norms_near<T>(links, num_links);
        wait_for_previous();
        produce_inputs<T>(links, num_links, room, rows, meeting);
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
        links[0] = {{&w0, &r0, nullptr, nullptr, residual, middle, features0, range0, steps0},                        \
                    false, x, width0, 0, nullptr, nullptr, 0, squares};                                               \
        links[1] = {{&w1, &r1, nullptr, nullptr, nullptr, inner, features1, range1, steps1},                          \
                    true, middle, features0, parts0, mlp_norm, squares, mlp_epsilon, nullptr};                        \
        links[2] = {{&w2, &r2, nullptr, nullptr, middle, out, features2, range2, steps2},                             \
                    false, inner, features1, 0, nullptr, nullptr, 0, next_squares};                                   \
        links[3] = {{&w3, &r3, nullptr, bias, nullptr, qkv, features3, range3, steps3},                               \
                    false, out, features2, parts2, next_norm, next_squares, next_epsilon, nullptr};                   \
    }                                                                                                                 \
    __syncthreads();                                                                                                  \
    run<T, ROWS>(links, num_links, rows, num_stages, num_x_stages, arrivals)
#else
#define RUN(T, ROWS) __trap()
#endif
#define MAPS(N) const __grid_constant__ TensorMap w##N, const __grid_constant__ TensorMap r##N
#define NUMBERS(N) int features##N, int range##N, int steps##N
#define KERNEL(NAME, T, ROWS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kChainThreads, 1) linear_chain_##NAME##_##ROWS(                      \
        MAPS(0), MAPS(1), MAPS(2), MAPS(3), const void* x, const void* residual, void* middle, const void* mlp_norm,  \
        void* inner, void* out, const void* next_norm, const void* bias, void* qkv, float* squares,                   \
        unsigned* arrivals, float mlp_epsilon, float next_epsilon, NUMBERS(0), NUMBERS(1), NUMBERS(2), NUMBERS(3),    \
        int width0, int parts0, int parts2, int num_links, int rows, int num_stages, int num_x_stages) {              \
        RUN(T, ROWS);                                                                                                 \
    }
#define KERNELS(NAME, T) \
    KERNEL(NAME, T, 16)  \
    KERNEL(NAME, T, 32)  \
    KERNEL(NAME, T, 64)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
