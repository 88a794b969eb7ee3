// The embedding lookup followed by a layer norm.
#pragma once
#include "layer_norm.cuh"

// A row of the embedding table, in 16 bits, or in 8 bits with a scale.
template <class T>
struct TableRow {
    const T* x;
    float scale;
    DEVICE_MEMBER Float4 operator()(int i) const {
        uint32_t p[2] = {reinterpret_cast<const uint32_t*>(x + i)[0],
                         reinterpret_cast<const uint32_t*>(x + i)[1]};
        return Float4{{low<T>(p[0]), high<T>(p[0]), low<T>(p[1]), high<T>(p[1])}};
    }
};
template <>
struct TableRow<int8_t> {
    const int8_t* x;
    float scale;
    DEVICE_MEMBER Float4 operator()(int i) const {
        uint32_t p = *reinterpret_cast<const uint32_t*>(x + i);
        Float4 v;
        UNROLL
        for (int j = 0; j < 4; j++)
            v.v[j] = static_cast<float>(static_cast<int8_t>(p >> (8 * j))) * scale;
        return v;
    }
};

// The id of a token. A job that was left to the host has no token yet; whatever is computed for it
// is thrown away.
DEVICE uint32_t token_id(const TokenIds& ids, uint32_t token) {
    uint32_t job = ids.sampled ? ids.pending[token] : ABSENT;
    if (job == ABSENT) return ids.ids[token];
    uint32_t id = ids.sampled[job].token;
    return id < ids.vocabulary ? id : 0;
}

// Writes the normalized embedding of a token, by one warp. `scales` is null for 16-bit tables.
template <class T>
DEVICE void embed_row(float* out, const TokenIds& ids, uint32_t token, const T* table,
                      const float* scales, const float* weight, const float* bias, uint32_t width,
                      float eps) {
    uint32_t id = token_id(ids, token);
    TableRow<T> row = {table + static_cast<size_t>(id) * width, scales ? scales[id] : 1.0f};
    float* to = out + static_cast<size_t>(token) * width;
    normalize(row, weight, bias, width, eps,
              [&](uint32_t i, Float4 v) { *reinterpret_cast<Float4*>(to + i) = v; });
}
