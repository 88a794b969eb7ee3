// The 16-bit floating-point types, vectors of numbers that are loaded and stored in one access, and
// conversions. All arithmetic is in f32.
#pragma once
#include "platform.cuh"

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// 16 bytes: eight 16-bit numbers in four pairs, or sixteen 8-bit numbers.
struct alignas(16) Pack16B {
    uint32_t pairs[4];
};
struct alignas(16) Float4 {
    float v[4];
};
struct alignas(8) Float2 {
    float v[2];
};

#ifdef KERNEL_EMULATOR
#include "emulated/numbers.h"
#else
DEVICE float uint_as_float(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t float_as_uint(float x) { return __float_as_uint(x); }
DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE void from_float(float x, f16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
DEVICE void from_float(float x, bf16& out) {
    out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// prmt: four bytes out of the eight of `y` and `x`. Each hexadecimal digit of `selector` says which
// byte comes to its place, 0 to 3 for those of `x` and 4 to 7 for those of `y`.
DEVICE uint32_t byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    return __byte_perm(x, y, selector);
}

// Approximations by a few instructions, for results that are rounded to 16 bits.
DEVICE float exp_approx(float x) { return __expf(x); }
DEVICE float divide_approx(float x, float y) { return __fdividef(x, y); }
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// The upper half of an f32 is the same number in bf16.
DEVICE float to_float(bf16 x) { return uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to the nearest number of T, bf16 or f16.
template <class T>
DEVICE T to_half(float x) {
    T out;
    from_float(x, out);
    return out;
}

// Two 16-bit numbers in one register, the first in the lower half.
template <class T>
DEVICE uint32_t pack(float low, float high) {
    return to_half<T>(low).bits | static_cast<uint32_t>(to_half<T>(high).bits) << 16;
}
template <class T>
DEVICE float low(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
DEVICE float high(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Converts the signed byte `i` of a word. A conversion instruction has a quarter of the throughput
// of arithmetic, so the byte is made unsigned by flipping its sign bit, put into the mantissa of
// 2^23, and 2^23 + 128 is subtracted, which is exact.
template <int i>
DEVICE float float_of_byte(uint32_t word) {
    uint32_t bits = byte_perm(word ^ 0x80808080, 0x4b000000, 0x7440 | i);
    return uint_as_float(bits) - 8388736.0f;
}
