// x @ weight^T for 5 to 128 rows of x on Hopper: the weights stream once from memory to the tensor cores.
//
// A tile is 128 rows of the weight, the left operand of wgmma; the rows of x are its columns. Each cluster of two
// blocks has an equal range of rows of the weight, each block half of the columns; behind a tile's last column they
// add up through each other's shared memory (small_linear_tiles.cuh). In a block one warp asks for weights, 64 columns
// of a tile at a time, into a ring in shared memory, one for x into a ring of its own, and two warpgroups have 64 rows
// of the tile each. Which columns a block has depends on their number alone, so a row's result depends neither on the
// other rows nor on how many there are.
//
// A block takes nearly all shared memory, so the next kernel's takes its place the moment it ends, and fills its ring
// of weights before it waits for the slowest block of this kernel. Room is left for blocks of a small kernel in between.
#include "dependent.cuh"
#include "small_linear_product.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
namespace {

template <typename T, int kRows, bool kGated>
__device__ __forceinline__ void run(const Task& task, int rows, int num_stages, int num_x_stages) {
    extern __shared__ __align__(1024) unsigned char shared[];
    let_next_begin();
    const int warp = threadIdx.x / 32;
    Room<kRows> room((shared_address(shared) + 1023) / 1024 * 1024, rows, num_stages, num_x_stages);
    if (warp == kConsumers && elect()) {
        bring_maps_near(task);
        room.init();
        publish_barriers();
    }
    __syncthreads();
    arrive_at_cluster();
    Product<T, kRows, kGated> product(task, room, rows);
    if (warp < kConsumers) {
        wait_for_cluster();
        wait_for_previous();
        product.consume(true, NoHooks());
        return;
    }
    if (warp == kConsumers) {
        if (elect()) product.produce_weights();
    } else {
        wait_for_previous();
        if (elect()) product.produce_inputs();
    }
    __syncwarp();
    wait_for_cluster();
}

}  // namespace
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define RUN(T, ROWS, GATED)                                                                                            \
    run<T, ROWS, GATED>({&weight_map, &rest_map, &x_map, bias, residual, out, features, range, steps}, rows, num_stages, \
                        num_x_stages)
#else
#define RUN(T, ROWS, GATED) __trap()
#endif
#define KERNEL(NAME, T, KIND, GATED, ROWS)                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) small_linear_tiles_##NAME##_##KIND##_##ROWS(         \
        const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap rest_map,                  \
        const __grid_constant__ TensorMap x_map, const void* bias, const void* residual, void* out, int rows,      \
        int features, int range, int steps, int num_stages, int num_x_stages) {                                    \
        RUN(T, ROWS, GATED);                                                                                       \
    }
#define KINDS(NAME, T, ROWS)            \
    KERNEL(NAME, T, plain, false, ROWS) \
    KERNEL(NAME, T, gated, true, ROWS)
#define KERNELS(NAME, T)   \
    KINDS(NAME, T, 16)     \
    KINDS(NAME, T, 32)     \
    KINDS(NAME, T, 64)     \
    KINDS(NAME, T, 96)     \
    KINDS(NAME, T, 128)
KERNELS(float16, float16)
KERNELS(bfloat16, bfloat16)
