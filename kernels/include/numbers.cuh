// 16-bit floating-point numbers, alone and by eights. Arithmetic is in f32 throughout.
#pragma once
#include "platform.cuh"

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#ifdef KERNEL_EMULATOR
DEVICE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
DEVICE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float to_float(f16 x) {
    _Float16 h;
    memcpy(&h, &x.bits, 2);
    return static_cast<float>(h);
}
DEVICE void from_float(float x, f16& out) {
    _Float16 h = static_cast<_Float16>(x);
    memcpy(&out.bits, &h, 2);
}
DEVICE void from_float(float x, bf16& out) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        out.bits = 0x7fff;
    } else {
        out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
#else
DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
DEVICE float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
DEVICE void from_float(float x, f16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }
DEVICE void from_float(float x, bf16& out) {
    out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
#endif
DEVICE float to_float(bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
DEVICE T narrow(float x) {
    T out;
    from_float(x, out);
    return out;
}

// Two numbers in a register, the first in the low half.
template <class T>
DEVICE uint32_t pack(float low, float high) {
    return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}
template <class T>
DEVICE float low(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
DEVICE float high(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// The signed byte `i` of a word. A conversion instruction has a quarter of the pace of arithmetic:
// the byte with its sign turned is put behind the exponent of 2^23 instead, and 2^23 + 128 taken
// off, which is exact.
template <int i>
DEVICE float float_of_byte(uint32_t word) {
    word ^= 0x80808080;
#ifdef KERNEL_EMULATOR
    uint32_t bits = 0x4b000000 | (word >> 8 * i & 0xff);
#else
    uint32_t bits = __byte_perm(word, 0x4b000000, 0x7440 | i);
#endif
    return float_of_bits(bits) - 8388736.0f;
}

// Sixteen bytes: eight 16-bit numbers or sixteen 8-bit ones.
struct alignas(16) Eight {
    uint32_t pairs[4];
};

// Four floats.
struct alignas(16) Four {
    float v[4];
};
