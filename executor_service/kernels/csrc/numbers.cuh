// Element types and 16-byte accesses, without a header of the CUDA toolkit: NVRTC then needs none either.
#pragma once

struct alignas(2) float16 {
    unsigned short bits;
};
struct alignas(2) bfloat16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ float to_float(float16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest, ties to even, as torch does.
template <typename T> __device__ __forceinline__ T from_float(float x);

template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

template <> __device__ __forceinline__ float16 from_float<float16>(float x) {
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
    // The scalar conversion came with sm_90 only, the one of a pair with sm_80.
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(x));
    bfloat16 y;
    y.bits = static_cast<unsigned short>(pair);
    return y;
}

template <typename T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// kCount elements that are loaded and stored together.
template <typename T, int kCount> struct alignas(sizeof(T) * kCount) Pack {
    T elements[kCount];
};

// How many elements one 16-byte access moves.
template <typename T> constexpr int kWide = 16 / sizeof(T);

template <typename T, int kCount> __device__ __forceinline__ Pack<T, kCount> load(const T* from) {
    return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <typename T, int kCount> __device__ __forceinline__ void store(T* to, const Pack<T, kCount>& pack) {
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// One name per dtype, that Python can look up: KERNEL_float32, KERNEL_float16, KERNEL_bfloat16.
#define FOR_EACH_DTYPE(MACRO) \
    MACRO(float32, float)     \
    MACRO(float16, float16)   \
    MACRO(bfloat16, bfloat16)
