// Stands in for the CUDA runtime where nobody has a GPU: csrc/sliding/sliding.cu then compiles as plain C++, and its
// kernels run in emulator.cpp, which is stricter than a GPU. Only what the kernels and their host code use is here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration,
    cudaErrorInvalidDevice,
    cudaErrorLaunchOutOfResources,
    cudaErrorLaunchFailure,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = void*;

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

extern dim3 threadIdx, blockIdx;  // of the thread that runs

namespace emulation {

using Body = void (*)(const void* kernel, const void* task);
cudaError_t launch(Body body, const void* kernel, const void* task, dim3 grid, dim3 block, size_t shared_bytes);

// What threads do together. All that take part bring the same kind, mask and source line.
enum class Kind { none, multiply, vote, syncwarp, barrier };
void together(Kind kind, unsigned mask, int line, void* own);

void* shared_memory();

}  // namespace emulation

namespace emulation {

// Calls a kernel of one argument. The copy of the host's structure is not an access of the kernel.
template <typename Task>
__attribute__((no_sanitize("thread", "undefined"))) void run(const void* kernel, const void* task) {
    reinterpret_cast<void (*)(Task)>(const_cast<void*>(kernel))(*static_cast<const Task*>(task));
}

}  // namespace emulation

template <typename Task>
cudaError_t cudaLaunchKernel(void (*kernel)(Task), dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
    return emulation::launch(emulation::run<Task>, reinterpret_cast<const void*>(kernel), arguments[0], grid, block,
                             shared_bytes);
}

template <typename Task>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Task), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

inline void __syncthreads(int line = __builtin_LINE()) { emulation::together(emulation::Kind::barrier, ~0u, line, nullptr); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulation::together(emulation::Kind::syncwarp, mask, line, nullptr);
}
