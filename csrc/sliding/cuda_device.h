// The few device functions that the CUDA kernels use, apart, so that tests/emulation/cuda_device.h can replace them:
// the same kernels then run as plain C++ without a GPU.
#pragma once

#include <cuda_runtime.h>

namespace patchscore {

// d += a b: an int32 tile [16][8] = bytes [16][32] x bytes [32][8], spread over a warp as PTX lays out mma.m16n8k32.
__device__ __forceinline__ void multiply(int (&d)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sum + a b over four signed bytes each.
__device__ __forceinline__ int dot4(int a, int b, int sum) { return __dp4a(a, b, sum); }

// 2^x in one instruction, good to 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2 x of x > 0 in one instruction, good to 2^-22; below 2^-126 it is -infinity.
__device__ __forceinline__ float log2_of(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

__device__ __forceinline__ float bits_as_float(int bits) { return __int_as_float(bits); }
__device__ __forceinline__ int bits_as_int(float value) { return __float_as_int(value); }

__device__ __forceinline__ int4* shared_memory() {
    extern __shared__ int4 memory[];
    return memory;
}

}  // namespace patchscore
