// The random number generator Philox 4x32-10 (Salmon et al. 2011); the host has the same in
// src/random.rs.
#pragma once
#include "numbers.cuh"

struct Philox4 {
    uint32_t w[4];
};

DEVICE uint32_t mul_hi(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

DEVICE Philox4 philox(uint32_t key0, uint32_t key1, Philox4 c) {
    for (int round = 0; round < 10; round++) {
        uint32_t high0 = mul_hi(0xD2511F53u, c.w[0]), low0 = 0xD2511F53u * c.w[0];
        uint32_t high1 = mul_hi(0xCD9E8D57u, c.w[2]), low1 = 0xCD9E8D57u * c.w[2];
        c = Philox4{{high1 ^ c.w[1] ^ key0, low1, high0 ^ c.w[3] ^ key1, low0}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}
