// Takes the place of csrc/sliding/cuda_device.h where kernels run as plain C++.
#pragma once

#include <cstring>

#include "cuda_runtime.h"

namespace patchscore {

struct Fragments {  // what a lane brings to a product; `d` is where its part of the sum is
    int* d;
    int a[4], b[2];
};

inline void multiply(int (&d)[4], int a0, int a1, int a2, int a3, int b0, int b1, int line = __builtin_LINE()) {
    Fragments own = {d, {a0, a1, a2, a3}, {b0, b1}};
    emulation::together(emulation::Kind::multiply, ~0u, line, &own);
}

inline bool any_lane(bool condition, int line = __builtin_LINE()) {
    emulation::together(emulation::Kind::vote, ~0u, line, &condition);
    return condition;
}

inline int dot4(int a, int b, int sum) {
    for (int shift = 0; shift < 32; shift += 8) sum += int8_t(a >> shift) * int8_t(b >> shift);
    return sum;
}

inline float power_of_two(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.f : y;
}

inline float log2_of(float x) { return x < 0x1p-126f ? -INFINITY : std::log2(x); }

inline float bits_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline int bits_as_int(float value) {
    int bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline int4* shared_memory() { return static_cast<int4*>(emulation::shared_memory()); }

}  // namespace patchscore
