// What the conversions and approximations of include/numbers.cuh mean on the CPU.
#pragma once

// Instruction: return __uint_as_float(bits);
DEVICE float uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
// Instruction: return __float_as_uint(x);
DEVICE uint32_t float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
// Instruction: return __half2float(__ushort_as_half(x.bits));
DEVICE float to_float(f16 x) {
    _Float16 h;
    memcpy(&h, &x.bits, 2);
    return static_cast<float>(h);
}
// Instruction: out.bits = __half_as_ushort(__float2half_rn(x));
DEVICE void from_float(float x, f16& out) {
    _Float16 h = static_cast<_Float16>(x);
    memcpy(&out.bits, &h, 2);
}
// Instruction: out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
DEVICE void from_float(float x, bf16& out) {
    uint32_t bits = float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        out.bits = 0x7fff; // as the GPU writes NaN
    } else {
        out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

// Instruction: return __byte_perm(x, y, selector);
DEVICE uint32_t byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t from = selector >> (4 * i) & 7;
        out |= static_cast<uint32_t>(bytes >> (8 * from) & 0xff) << (8 * i);
    }
    return out;
}

// An exact result is one that the approximations may have.
// Instruction: return __expf(x);
DEVICE float exp_approx(float x) { return expf(x); }
// Instruction: return __fdividef(x, y);
DEVICE float divide_approx(float x, float y) { return x / y; }
// Instruction: ex2.approx.ftz.f32 %0, %1;
DEVICE float exp2_approx(float x) { return exp2f(x); }
