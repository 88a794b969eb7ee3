// Rows in 16 bits or f32, four elements at a time.
#pragma once
#include "numbers.cuh"

DEVICE Float4 take_four(const float* from) { return *reinterpret_cast<const Float4*>(from); }
template <class T>
DEVICE Float4 take_four(const T* from) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(from);
    return Float4{{low<T>(pairs[0]), high<T>(pairs[0]), low<T>(pairs[1]), high<T>(pairs[1])}};
}

DEVICE void put_four(float* to, Float4 v) { *reinterpret_cast<Float4*>(to) = v; }
template <class T>
DEVICE void put_four(T* to, Float4 v) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    pairs[0] = pack<T>(v.v[0], v.v[1]);
    pairs[1] = pack<T>(v.v[2], v.v[3]);
}
