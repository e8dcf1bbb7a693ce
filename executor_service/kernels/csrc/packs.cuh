// Packs of elements as floats and back. Elements of 16 bits go in pairs: then no compiler spreads a pack over twice the
// registers, and one instruction rounds two.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ unsigned pair_of(float low, float high, bfloat16) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ unsigned pair_of(float low, float high, float16) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void split(unsigned pair, float& low, float& high, bfloat16) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void split(unsigned pair, float& low, float& high, float16) {
    asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
}

// kCount floats; a type of its own, so that it is returned in registers.
template <int kCount> struct Floats {
    float elements[kCount];
};

template <typename T, int kCount> __device__ __forceinline__ Floats<kCount> floats_of(const Pack<T, kCount>& pack) {
    Floats<kCount> floats;
    if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
        const unsigned* words = reinterpret_cast<const unsigned*>(&pack);
#pragma unroll
        for (int e = 0; e < kCount; e += 2) split(words[e / 2], floats.elements[e], floats.elements[e + 1], T());
    } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) floats.elements[e] = to_float(pack.elements[e]);
    }
    return floats;
}

// Each element rounded to nearest, ties to even.
template <typename T, int kCount> __device__ __forceinline__ Pack<T, kCount> pack_of(const Floats<kCount>& floats) {
    Pack<T, kCount> pack;
    if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
        unsigned* words = reinterpret_cast<unsigned*>(&pack);
#pragma unroll
        for (int e = 0; e < kCount; e += 2) words[e / 2] = pair_of(floats.elements[e], floats.elements[e + 1], T());
    } else {
#pragma unroll
        for (int e = 0; e < kCount; ++e) pack.elements[e] = from_float<T>(floats.elements[e]);
    }
    return pack;
}

// Adds a residual to a pack: the sum is rounded, stored and left in `pack`.
template <typename T, int kCount>
__device__ __forceinline__ void add_residual(Pack<T, kCount>& pack, const Pack<T, kCount>& residual, T* to) {
    Floats<kCount> sum = floats_of(pack);
    const Floats<kCount> before = floats_of(residual);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum.elements[e] += before.elements[e];
    pack = pack_of<T>(sum);
    store<T, kCount>(to, pack);
}
