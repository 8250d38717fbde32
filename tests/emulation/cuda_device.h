// A GPU of one thread, to run the CUDA kernels as plain C++: takes the place of csrc/sliding/cuda_device.h.
//
// Every thread of a block is a fiber; warp and block operations hand over to the next fiber until all have come. Shared
// memory starts as NaN and every access a block makes beyond it ends in a guard that is checked.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchOutOfResources };
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "refused by the emulation"; }
inline const char* cudaGetErrorName(cudaError_t) { return "emulation"; }

inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0);

namespace emulation {

constexpr size_t STACK = 64 << 10, GUARD = 4096;
constexpr unsigned char PATTERN = 0xff;  // as floats: NaN

struct Fiber {
    ucontext_t context;
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    int waits_for = 0;      // how often its warp (or block) met, when this fiber came to wait
};

// What the threads of a warp bring to an operation that they do together.
struct Warp {
    int come = 0, met = 0;
    int a[32][4], b[32][2], d[32][4];
    bool condition[32], any;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    int come = 0, met = 0;
    std::vector<unsigned char> memory;
    std::function<void()> kernel;
    jmp_buf scheduler;
    ucontext_t main;
};

inline Block* block = nullptr;

inline void pause_fiber() {
    Fiber& fiber = block->fibers[threadIdx.x];
    if (!_setjmp(fiber.here)) _longjmp(block->scheduler, 1);
}

inline void entry() {
    block->kernel();
    block->fibers[threadIdx.x].done = true;
    _longjmp(block->scheduler, 1);
}

inline void run_block() {
    for (bool left = true; left;) {
        left = false;
        for (unsigned thread = 0; thread < block->fibers.size(); ++thread) {
            Fiber& fiber = block->fibers[thread];
            if (fiber.done) continue;
            left = true;
            threadIdx.x = thread;
            if (_setjmp(block->scheduler)) continue;
            if (fiber.started) _longjmp(fiber.here, 1);
            fiber.started = true;
            getcontext(&fiber.context);
            fiber.stack.reset(new char[STACK]);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, entry, 0);
            setcontext(&fiber.context);
        }
    }
}

// The last thread of the warp does the work; the others wait for it.
template <typename Work>
void together(Warp& warp, const Work& work) {
    const int met = warp.met;
    if (++warp.come == 32) {
        work();
        warp.come = 0;
        ++warp.met;
    }
    while (warp.met == met) pause_fiber();
}

inline int byte(int quad, int i) { return int(int8_t(unsigned(quad) >> (8 * i) & 255)); }

}  // namespace emulation

inline void __syncwarp() {}

inline void __syncthreads() {
    emulation::Block& block = *emulation::block;
    const int met = block.met;
    if (++block.come == int(block.fibers.size())) {
        block.come = 0;
        ++block.met;
    }
    while (block.met == met) emulation::pause_fiber();
}

namespace patchscore {

inline void multiply(int (&d)[4], int a0, int a1, int a2, int a3, int b0, int b1) {
    const int lane = int(threadIdx.x) % 32;
    emulation::Warp& warp = emulation::block->warps[threadIdx.x / 32];
    const int a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(warp.a[lane], a, sizeof a);
    std::memcpy(warp.b[lane], b, sizeof b);
    std::memcpy(warp.d[lane], d, sizeof d);
    emulation::together(warp, [&] {
        // PTX ISA, "Matrix fragments for mma.m16n8k32": where the threads of a warp hold A [16][32] and B [32][8].
        int A[16][32], B[32][8];
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                for (int reg = 0; reg < 4; ++reg)
                    A[l / 4 + (reg % 2 ? 8 : 0)][l % 4 * 4 + i + (reg >= 2 ? 16 : 0)] = emulation::byte(warp.a[l][reg], i);
                for (int reg = 0; reg < 2; ++reg)
                    B[l % 4 * 4 + i + 16 * reg][l / 4] = emulation::byte(warp.b[l][reg], i);
            }
        for (int l = 0; l < 32; ++l)
            for (int reg = 0; reg < 4; ++reg) {
                const int row = l / 4 + (reg >= 2 ? 8 : 0), col = l % 4 * 2 + reg % 2;
                for (int x = 0; x < 32; ++x) warp.d[l][reg] += A[row][x] * B[x][col];
            }
    });
    std::memcpy(d, warp.d[lane], sizeof d);
}

inline int dot4(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += emulation::byte(a, i) * emulation::byte(b, i);
    return sum;
}

inline float power_of_two(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.f : y;
}

inline bool any_lane(bool condition) {
    emulation::Warp& warp = emulation::block->warps[threadIdx.x / 32];
    warp.condition[threadIdx.x % 32] = condition;
    emulation::together(warp, [&] {
        warp.any = false;
        for (bool one : warp.condition) warp.any = warp.any || one;
    });
    return warp.any;
}

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

inline int4* shared_memory() { return reinterpret_cast<int4*>(emulation::block->memory.data()); }

template <typename Task>
cudaError_t launch(void (*kernel)(Task), dim3 blocks, int threads, int shared_bytes, void*, const Task& task) {
    if (shared_bytes > 227 * 1024 || blocks.x == 0 || blocks.y > 65535 || blocks.z > 65535)
        return cudaErrorLaunchOutOfResources;
    for (unsigned z = 0; z < blocks.z; ++z)
        for (unsigned y = 0; y < blocks.y; ++y)
            for (unsigned x = 0; x < blocks.x; ++x) {
                emulation::Block block;
                block.fibers.resize(size_t(threads));
                block.warps.resize(size_t(threads) / 32);
                block.memory.assign(size_t(shared_bytes) + emulation::GUARD, emulation::PATTERN);
                block.kernel = [&] { kernel(task); };
                emulation::block = &block;
                blockIdx = dim3(x, y, z);
                emulation::run_block();
                for (size_t i = 0; i < emulation::GUARD; ++i)
                    if (block.memory[size_t(shared_bytes) + i] != emulation::PATTERN) {
                        std::fprintf(stderr, "a kernel wrote beyond its shared memory\n");
                        std::abort();
                    }
            }
    return cudaSuccess;
}

}  // namespace patchscore
