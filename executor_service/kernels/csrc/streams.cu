// How fast this GPU's memory can be read and written: the ceilings that streaming kernels are measured against.
namespace {

constexpr int kInFlight = 4;

}  // namespace

// Reads `count` packs of 16 bytes and stores one value per block, so that nothing is optimised away.
extern "C" __global__ void __launch_bounds__(512) read_stream(const uint4* from, unsigned* sums, long long count) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + (kInFlight - 1) * stride < count; i += kInFlight * stride) {
        uint4 packs[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) packs[k] = __ldcs(from + i + k * stride);
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) sum += packs[k].x ^ packs[k].y ^ packs[k].z ^ packs[k].w;
    }
    for (; i < count; i += stride) {
        const uint4 pack = __ldcs(from + i);
        sum += pack.x ^ pack.y ^ pack.z ^ pack.w;
    }
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) atomicAdd(sums + blockIdx.x, sum);
}

// Writes `count` packs of 16 bytes.
extern "C" __global__ void __launch_bounds__(512) write_stream(uint4* to, unsigned value, long long count) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const unsigned word = value + static_cast<unsigned>(i);
        __stcs(to + i, make_uint4(word, ~word, word, ~word));
    }
}
