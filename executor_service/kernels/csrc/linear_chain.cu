// A decoder layer from what attention gives to the next layer's queries, keys and values, for few rows, in one kernel:
// output, norm, gate and up, down, norm, qkv. Each product is that of small_linear_tiles.cu, to the bit.
//
// Weights depend on nothing, so who asks for them goes from matrix to matrix without a break. Only x has to wait until
// all blocks have stored: then blocks meet by a counter in memory, for norms twice, and the rings, which hold some five
// microseconds of weights, fill meanwhile. Between kernels, blocks end and begin together, and memory has nothing to
// do for two. Blocks that wait for each other must all be resident: no grid is larger than what fits, and this kernel's
// blocks are there before any of the next kernel's.
#include "dependent.cuh"
#include "early.cuh"
#include "linear_chain.cuh"
#include "packs.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace {

constexpr int kNormThreads = 32 * kConsumers;
constexpr int kNormPacks = 4;  // of a thread: rows have up to 8,192 elements

// All consumers get the sum.
__device__ __forceinline__ float sum_of_consumers(float value, float* parts) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    asm volatile("bar.sync 1, %0;" ::"n"(kNormThreads) : "memory");
    value = 0.0f;
#pragma unroll
    for (int i = 0; i < kConsumers; ++i) value += parts[i];
    asm volatile("bar.sync 1, %0;" ::"n"(kNormThreads) : "memory");
    return value;
}

// Blocks have a row each, and further ones where there are more rows. Rounded where rms_norm.cu rounds.
template <typename T> __device__ void normalize_rows(const Link& link, int rows, float* parts) {
    const int width = link.task.features;
    const T *from = static_cast<const T*>(link.task.out), *weight = static_cast<const T*>(link.norm_weight);
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        Pack<T, 8> values[kNormPacks], factors[kNormPacks];
#pragma unroll
        for (int i = 0; i < kNormPacks; ++i) {
            const int at = (i * kNormThreads + threadIdx.x) * 8;
            if (at >= width) continue;
            values[i] = load<T, 8>(from + static_cast<long long>(row) * width + at);
            factors[i] = load<T, 8>(weight + at);
        }
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kNormPacks; ++i) {
            if ((i * kNormThreads + threadIdx.x) * 8 >= width) continue;
            const Floats<8> x = floats_of(values[i]);
#pragma unroll
            for (int e = 0; e < 8; ++e) squares += x.elements[e] * x.elements[e];
        }
        const float scale = rsqrtf(sum_of_consumers(squares, parts) / width + link.epsilon);
#pragma unroll
        for (int i = 0; i < kNormPacks; ++i) {
            const int at = (i * kNormThreads + threadIdx.x) * 8;
            if (at >= width) continue;
            Floats<8> x = floats_of(values[i]);
#pragma unroll
            for (int e = 0; e < 8; ++e) x.elements[e] *= scale;
            x = floats_of(pack_of<T>(x));
            const Floats<8> factor = floats_of(factors[i]);
#pragma unroll
            for (int e = 0; e < 8; ++e) x.elements[e] *= factor.elements[e];
            store<T, 8>(static_cast<T*>(link.normal) + static_cast<long long>(row) * width + at, pack_of<T>(x));
        }
    }
}

// Blocks that will have a row bring the norms' weights to the L2 cache, which nobody else reads.
template <typename T> __device__ __forceinline__ void bring_norms_near(const Link* links, int num_links, int rows) {
    if (static_cast<int>(blockIdx.x) >= rows) return;
    constexpr int kLine = 128 / sizeof(T);
    for (int i = 0; i < num_links; ++i) {
        if (!links[i].normal) continue;
        for (int at = threadIdx.x * kLine; at < links[i].task.features; at += kNormThreads * kLine)
            bring_near(static_cast<const T*>(links[i].norm_weight) + at);
    }
}

template <typename T, int kRows>
__device__ __forceinline__ void run(
    const Link* links, int num_links, int rows, int num_stages, int num_x_stages, unsigned* arrivals) {
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ float parts[kConsumers];
    using Plain = Product<T, kRows, false>;
    using Gated = Product<T, kRows, true>;
    const int warp = threadIdx.x / 32;
    Room<kRows> room((shared_address(shared) + 1023) / 1024 * 1024, rows, num_stages, num_x_stages);
    Meeting meeting{room.end, room.end + 8, arrivals, 0, 0};
    if (warp == kConsumers && elect()) {
        bring_maps_near(links[0].task);
        room.init();
        meeting.init();
        publish_barriers();
    }
    __syncthreads();
    arrive_at_cluster();
    if (warp < kConsumers) {
        bring_norms_near<T>(links, num_links, rows);
        wait_for_cluster();
        wait_for_previous();
        follow(links, num_links,
               [&](const Link& link) {
                   if (link.is_gated) Gated(link.task, room, rows).consume(false);
                   else Plain(link.task, room, rows).consume(false);
               },
               [&](const Link& link) { normalize_rows<T>(link, rows, parts); },
               [&] { meeting.meet_as_consumer(); });
    } else if (warp == kConsumers) {
        if (elect()) {
            for (int i = 0; i < num_links; ++i) {
                const Link link = links[i];
                if (i + 1 < num_links) bring_maps_near(links[i + 1].task);
                if (link.is_gated) Gated(link.task, room, rows).produce_weights();
                else Plain(link.task, room, rows).produce_weights();
            }
        }
        __syncwarp();
        wait_for_cluster();
    } else {
        wait_for_previous();
        if (elect()) {
            follow(links, num_links,
                   [&](const Link& link) {
                       if (link.is_gated) Gated(link.task, room, rows).produce_inputs();
                       else Plain(link.task, room, rows).produce_inputs();
                   },
                   [](const Link&) {}, [&] { meeting.meet_as_clerk(); });
            meeting.leave();
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
        links[0] = {{&w0, &r0, &x0, nullptr, residual, middle, features0, range0, steps0},                            \
                    false, mlp_norm, normal, mlp_epsilon};                                                            \
        links[1] = {{&w1, &r1, &x1, nullptr, nullptr, inner, features1, range1, steps1}, true, nullptr, nullptr, 0};  \
        links[2] = {{&w2, &r2, &x2, nullptr, middle, out, features2, range2, steps2},                                 \
                    false, next_norm, next_normal, next_epsilon};                                                     \
        links[3] = {{&w3, &r3, &x3, bias, nullptr, qkv, features3, range3, steps3}, false, nullptr, nullptr, 0};      \
    }                                                                                                                 \
    __syncthreads();                                                                                                  \
    run<T, ROWS>(links, num_links, rows, num_stages, num_x_stages, arrivals)
#else
#define RUN(T, ROWS) __trap()
#endif
#define MAPS(N)                                                                          \
    const __grid_constant__ TensorMap w##N, const __grid_constant__ TensorMap r##N,      \
        const __grid_constant__ TensorMap x##N
#define NUMBERS(N) int features##N, int range##N, int steps##N
#define KERNEL(NAME, T, ROWS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) linear_chain_##NAME##_##ROWS(                           \
        MAPS(0), MAPS(1), MAPS(2), MAPS(3), const void* residual, void* middle, const void* mlp_norm, void* normal,   \
        void* inner, void* out, const void* next_norm, void* next_normal, const void* bias, void* qkv,                \
        unsigned* arrivals, float mlp_epsilon, float next_epsilon, NUMBERS(0), NUMBERS(1), NUMBERS(2), NUMBERS(3),    \
        int num_links, int rows, int num_stages, int num_x_stages) {                                                  \
        RUN(T, ROWS);                                                                                                 \
    }
#define KERNELS(NAME, T) \
    KERNEL(NAME, T, 16)  \
    KERNEL(NAME, T, 32)  \
    KERNEL(NAME, T, 64)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
