// x @ weight^T for 17 to 64 rows of x, on Hopper's own tensor core instruction; otherwise as small_linear.cu.
//
// The weight's rows are the product's columns: tiles of 32, copied through a tensor map into the layout that wgmma
// reads. The rows of x are the left operand, in registers. Where a block's share of rows is so small that reading x
// costs as much as the weight, clusters of blocks take the share of all of them and split the columns instead; their
// sums are added in a fixed order through each other's shared memory.
#include "dependent.cuh"
#include "numbers.cuh"
#include "small_linear_ring.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * (kWarps + 1);
[[maybe_unused]] constexpr int kTileRows = 32;
// Columns of the weight in one stage: two atoms of 64.
[[maybe_unused]] constexpr int kPiece = 128;
[[maybe_unused]] constexpr int kMaxTiles = 6;
// Eight rows of 128 bytes, as wgmma wants them and one copy brings them.
[[maybe_unused]] constexpr int kAtomBytes = 1024;
[[maybe_unused]] constexpr int kStageBytes = kTileRows * kPiece * 2;
// Words between rows of a tile's sums in shared memory.
[[maybe_unused]] constexpr int kSumsPitch = 40;

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void copy_box(
    unsigned to, const TensorMap* map, int column, int row, unsigned barrier, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
}

// 32 rows x 64 columns of 128-byte rows in shared memory, swizzled; atoms of eight rows follow each other.
__device__ __forceinline__ unsigned long long descriptor(unsigned address) {
    constexpr unsigned long long kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<unsigned long long>(kAtomBytes >> 4) << 32 | 1ull << 16 |
           ((address & 0x3ffff) >> 4);
}

// sums[64][32] += a[64][16] b[32][16]^T: begins with `fence_products`, ends with `commit_products` and a wait.
template <typename T>
__device__ __forceinline__ void add_products(float (&sums)[16], const unsigned (&a)[4], unsigned long long b);

#define ADD_PRODUCTS(T, NAME)                                                                                        \
    template <>                                                                                                      \
    __device__ __forceinline__ void add_products<T>(                                                                 \
        float (&sums)[16], const unsigned (&a)[4], unsigned long long b) {                                           \
        asm volatile(                                                                                                \
            "wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " \
            "%10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"                                  \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]),              \
              "+f"(sums[6]), "+f"(sums[7]), "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11]),            \
              "+f"(sums[12]), "+f"(sums[13]), "+f"(sums[14]), "+f"(sums[15])                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                   \
    }
ADD_PRODUCTS(float16, "f16")
ADD_PRODUCTS(bfloat16, "bf16")
#undef ADD_PRODUCTS

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A word of another block's shared memory, at the address that it has here.
__device__ __forceinline__ float load_from_rank(unsigned address, unsigned rank) {
    unsigned there;
    float value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
    return value;
}

template <typename T, bool kGated> struct Product {
    static constexpr int kUnits = kGated ? kTileRows / 2 : kTileRows;
    const TensorMap *map, *x_map;
    const T *bias, *residual;
    T* out;
    int rows, box_rows, features, width, cluster;
    Share share;
    int first_piece, pieces;  // this block's columns
    Ring weights, inputs;

    // --- the producer's warp ---

    // Boxes of 16 rows x 64 columns: all columns' first 16 rows, or the gate's, before the others.
    __device__ void put_weights(const Position& at, unsigned long long policy) {
        const int first = share.first(at.pass, at.tile), column = (first_piece + at.piece) * kPiece;
        const int halves = kGated || share.units_at(first) > 16 ? 2 : 1;
        const unsigned to = weights.here(), barrier = weights.full_here();
        if (elect()) {
            arrive_expecting(barrier, halves * kStageBytes / 2);
            for (int half = 0; half < halves; ++half)
#pragma unroll
                for (int block = 0; block < kPiece / 64; ++block)
                    copy_box(to + (block * 4 + half * 2) * kAtomBytes, map, column + block * 64,
                             first + half * (kGated ? features : 16), barrier, policy);
        }
        weights.advance();
    }

    __device__ void put_inputs(int sequence, unsigned long long policy) {
        const int from = (first_piece + sequence % pieces) * kPiece;
        if (sequence >= inputs.stages) wait_for_phase(inputs.empty_here(), inputs.parity ^ 1);
        const unsigned to = inputs.here(), barrier = inputs.full_here();
        if (elect()) {
            arrive_expecting(barrier, box_rows * kPiece * 2);
#pragma unroll
            for (int block = 0; block < kPiece / 64; ++block)
                copy_box(to + block * box_rows * 128, x_map, from + block * 64, 0, barrier, policy);
        }
        inputs.advance();
    }

    __device__ void produce(int lead) {
        const unsigned long long policy = read_once_policy(), x_policy = keep_policy();
        const int total = share.tiles * pieces, filled = min(weights.stages, total);
        Position at;
        int inputs_needed = 0;
        for (int i = 0; i < filled; ++i) {
            put_weights(at, policy);
            inputs_needed = at.sequence + 1;
            at.advance(share, pieces);
        }
        if (total - filled <= lead) let_next_begin();
        wait_for_previous();
        int inputs_put = 0;
        while (inputs_put < inputs_needed) put_inputs(inputs_put++, x_policy);
        for (int i = filled; i < total; ++i) {
            if (at.sequence == inputs_put) put_inputs(inputs_put++, x_policy);
            wait_for_phase(weights.empty_here(), weights.parity ^ 1);
            put_weights(at, policy);
            at.advance(share, pieces);
            if (total - i - 1 == lead) let_next_begin();
        }
    }

    // --- the consumers' warps, 16 rows of x each ---

    float sums[kMaxTiles][16];
    unsigned left[kPiece / 16][4];

    __device__ void load_inputs() {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        wait_for_phase(inputs.full_here(), inputs.parity);
        // Rows that are not there repeat others: what they give is not stored.
        const int row = min(warp * 16 + lane % 16, box_rows - 1);
        const unsigned from = inputs.here() + row * 128;
#pragma unroll
        for (int i = 0; i < kPiece / 16; ++i) {
            const int pack = (i % 4 * 2 + lane / 16) ^ (row % 8);
            load_matrices(left[i], from + i / 4 * box_rows * 128 + pack * 16);
        }
        release(inputs.empty_here());
        inputs.advance();
    }

    __device__ void add_tile(float (&to)[16]) {
        wait_for_phase(weights.full_here(), weights.parity);
        fence_products();
#pragma unroll
        for (int i = 0; i < kPiece / 16; ++i)
            add_products<T>(to, left[i], descriptor(weights.here() + i / 4 * 4 * kAtomBytes + i % 4 * 32));
        commit_products();
        wait_for_products<0>();
        release(weights.empty_here());
        weights.advance();
    }

    // Place of sums[tile][i]: row of x, and column of the tile.
    __device__ static int x_row_of(int i) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8; }
    __device__ static int unit_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

    __device__ void put(int x_row, int feature, float value) const {
        if (bias) value += to_float(bias[feature]);
        const long long to = static_cast<long long>(x_row) * features + feature;
        if (residual) value += to_float(residual[to]);
        out[to] = from_float<T>(value);
    }

    __device__ void put_tile(const float (&from)[16], int first) const {
        const int units = share.units_at(first);
#pragma unroll
        for (int i = 0; i < (kGated ? 8 : 16); ++i) {
            if (x_row_of(i) >= rows || unit_of(i) >= units) continue;
            float value = from[i];
            if constexpr (kGated) {
                const float gate = rounded<T>(value);
                value = rounded<T>(silu<T>(gate)) * rounded<T>(from[i + 8]);
            }
            put(x_row_of(i), first + unit_of(i), value);
        }
    }

    __device__ void consume(unsigned base) {
        for (int pass = 0; pass < share.passes; ++pass) {
            const int tiles = share.tiles_in(pass);
#pragma unroll
            for (int tile = 0; tile < kMaxTiles; ++tile)
#pragma unroll
                for (int i = 0; i < 16; ++i) sums[tile][i] = 0.0f;
            for (int piece = 0; piece < pieces; ++piece) {
                load_inputs();
#pragma unroll
                for (int tile = 0; tile < kMaxTiles; ++tile)
                    if (tile < tiles) add_tile(sums[tile]);
            }
            if (cluster > 1) {
                show_sums(base, tiles);
            } else {
#pragma unroll
                for (int tile = 0; tile < kMaxTiles; ++tile)
                    if (tile < tiles) put_tile(sums[tile], share.first(pass, tile));
            }
        }
    }

    // --- a cluster's end: sums [tile][x row][kSumsPitch] lie where the stages were ---

    __device__ void show_sums(unsigned base, int tiles) const {
        asm volatile("bar.sync 1, %0;" ::"n"(32 * kWarps) : "memory");
#pragma unroll
        for (int tile = 0; tile < kMaxTiles; ++tile) {
            if (tile >= tiles) break;
#pragma unroll
            for (int i = 0; i < 16; i += 2) {
                if (x_row_of(i) >= rows) continue;
                const unsigned to = base + ((tile * rows + x_row_of(i)) * kSumsPitch + unit_of(i)) * 4;
                asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sums[tile][i]), "f"(sums[tile][i + 1])
                             : "memory");
            }
        }
    }

    __device__ void add_ranks(unsigned base) const {
        const int count = share.tiles * rows * kTileRows;
        for (int i = cluster_rank() * kThreads + threadIdx.x; i < count; i += cluster * kThreads) {
            const int unit = i % kTileRows, x_row = i / kTileRows % rows, tile = i / kTileRows / rows;
            const int first = share.first(0, tile);
            if (unit >= share.units_at(first)) continue;
            float sum = 0.0f;
            for (int rank = 0; rank < cluster; ++rank)
                sum += load_from_rank(base + ((tile * rows + x_row) * kSumsPitch + unit) * 4, rank);
            put(x_row, first + unit, sum);
        }
    }
};

#endif

template <typename T, bool kGated>
__device__ __forceinline__ void stream_linear(
    const TensorMap* map, const TensorMap* x_map, const T* bias, const T* residual, T* out, int rows, int features,
    int width, int cluster, int num_stages, int num_input_stages, int lead) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned base = shared_address(shared);
    const int box_rows = (rows + 7) / 8 * 8;
    Ring weights{base, kStageBytes};
    Ring inputs{base + num_stages * kStageBytes, static_cast<unsigned>(box_rows * kPiece * 2)};
    weights.stages = num_stages, inputs.stages = num_input_stages;
    weights.full = inputs.data + num_input_stages * inputs.stride;
    weights.empty = weights.full + 8 * num_stages;
    inputs.full = weights.empty + 8 * num_stages;
    inputs.empty = inputs.full + 8 * num_input_stages;
    if (threadIdx.x == 0) {
        weights.init(kWarps);
        inputs.init(kWarps);
        publish_barriers();
    }
    __syncthreads();
    const int all_pieces = width / kPiece, rank = cluster_rank();
    const int first_piece = all_pieces * rank / cluster, end_piece = all_pieces * (rank + 1) / cluster;
    Product<T, kGated> product{map, x_map, bias, residual, out, rows, box_rows, features, width, cluster,
                               Share(features, Product<T, kGated>::kUnits, kMaxTiles, blockIdx.x / cluster, gridDim.x / cluster), first_piece,
                               end_piece - first_piece, weights, inputs};
    if (threadIdx.x / 32 == kWarps) {
        product.produce(lead);
    } else {
        wait_for_previous();
        product.consume(base);
    }
    if (cluster > 1) {
        __syncwarp();
        sync_cluster();
        product.add_ranks(base);
        sync_cluster();
    }
#endif
}

}  // namespace

#define KERNEL(NAME, T, KIND, GATED)                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) small_linear_wgmma_##NAME##_##KIND(                \
        const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap x_map, const T* bias,            \
        const T* residual, T* out, int rows,   \
        int features, int width, int cluster, int num_stages, int num_input_stages, int lead) { \
        stream_linear<T, GATED>(&map, &x_map, bias, residual, out, rows, features, width, cluster, num_stages,        \
                                num_input_stages, lead);                                         \
    }
#define KERNELS(NAME, T)            \
    KERNEL(NAME, T, plain, false)   \
    KERNEL(NAME, T, gated, true)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
