// Kernels with one fault each, and some without, for tests/test_emulation.py: what the emulator must refuse or let pass.
#include <cstdint>

#include "cuda_device.h"

struct Task {
    int kind, n;
    int* out;
    const int* in;
};

constexpr int THREADS = 64;

__global__ void fault_kernel(const Task t) {
    int* const shared = reinterpret_cast<int*>(patchscore::shared_memory());
    const int own = int(threadIdx.x), lane = own % 32, warp = own / 32, neighbour = (own + 1) % THREADS;
    const int in_warp = warp * 32 + (lane + 1) % 32;
    switch (t.kind) {
        case 0:  // none: a copy through shared memory, then what a warp does together
            shared[own] = t.in[own];
            __syncthreads();
            t.out[int(blockIdx.x) * THREADS + own] = shared[neighbour] + patchscore::any_lane(lane == 3);
            __syncthreads();
            shared[own] = own;
            __syncwarp();
            t.out[int(blockIdx.x) * THREADS + own + t.n / 2] = shared[in_warp];
            return;
        case 1:  // no barrier between a write and another warp's read
            shared[own] = own;
            t.out[own] = shared[(own + 32) % THREADS];
            return;
        case 2:  // no barrier between a read and another thread's write
            shared[own] = own;
            __syncthreads();
            t.out[own] = shared[neighbour];
            shared[own] = 1;
            return;
        case 3:  // lanes of one warp are not in step by themselves
            shared[own] = own;
            t.out[own] = shared[in_warp];
            return;
        case 4:  // a vote does not order memory
            shared[own] = own;
            patchscore::any_lane(true);
            t.out[own] = shared[in_warp];
            return;
        case 5:  // lanes outside the mask are not waited for
            shared[own] = own;
            if (lane < 16) {
                __syncwarp(0xffffu);
                t.out[own] = shared[own + 16];
            }
            return;
        case 6:  // a mask of half a warp is fine for that half
            shared[own] = own;
            if (lane < 16) {
                __syncwarp(0xffffu);
                t.out[own] = shared[warp * 32 + (lane + 1) % 16];
            }
            return;
        case 7:  // two threads write one place
            shared[own / 2] = own;
            return;
        case 8:  // nobody wrote that
            if (own) shared[own] = own;
            __syncthreads();
            t.out[own] = shared[own];
            return;
        case 9:  // lanes of a warp come to different operations
            if (lane < 16) patchscore::any_lane(true);
            else __syncwarp();
            return;
        case 10:  // and with different masks
            __syncwarp(lane < 16 ? 0xffffu : 0xffffffffu);
            return;
        case 11:  // the full mask where half of the lanes are
            for (int turn = 0; turn < 1 + lane / 16; ++turn) __syncwarp();
            patchscore::any_lane(true);
            return;
        case 12:
            __syncwarp(0xfffffffeu);
            return;
        case 13:
            if (lane == 5) return;
            patchscore::any_lane(true);
            return;
        case 14:
            if (own < 40) __syncthreads();
            return;
        case 15:  // threads come to different barriers
            if (warp) __syncthreads();
            else
                __syncthreads();
            return;
        case 16:  // a warp's lanes: some at a barrier, some at a vote
            if (lane < 16) __syncthreads();
            else patchscore::any_lane(true);
            return;
        case 17:
            shared[own + 1] = own;  // one beyond the last
            return;
        case 18:
            t.out[own] = t.in[own + 1];
            return;
        case 19:
            t.out[own + 1] = t.in[own];
            return;
        case 20:
            t.out[own - 1] = t.in[own];
            return;
        case 21:  // two blocks write one place
            t.out[own] = int(blockIdx.x);
            return;
        case 22:  // another thread's result of the same launch
            t.out[own] = own;
            __syncthreads();
            t.out[own + t.n / 2] = t.out[neighbour];
            return;
        case 23:
            reinterpret_cast<int4*>(t.out + 1)[own] = {own, own, own, own};
            return;
        case 24:
            t.out[own] = INT32_MAX - 62 + own;
            return;
        case 25: {  // lanes of one warp run a product each in a place of its own
            int d[4] = {0, 0, 0, 0};
            if (lane < 16) patchscore::multiply(d, 1, 1, 1, 1, 1, 1);
            else
                patchscore::multiply(d, 1, 1, 1, 1, 1, 1);
            return;
        }
        case 26: {  // a product whose sum is beyond an int
            int d[4] = {INT32_MAX, 0, 0, 0};
            patchscore::multiply(d, 1, 1, 1, 1, 1, 1);
            return;
        }
        case 27: {  // a local variable that nobody set
            int local[4];
            for (int i = 0; i < t.n; ++i) local[i % 4] = i;
            t.out[own] = local[own % 4];
            return;
        }
        default: return;
    }
}

#define PS_EXPORT extern "C" __attribute__((visibility("default")))

// The error of a launch, as CUDA numbers it here; `remembered`: what cudaGetLastError says afterwards, twice.
PS_EXPORT int fault_run(const Task* task, int x, int y, int z, int threads, int shared, int* remembered) {
    void* arguments[] = {const_cast<Task*>(task)};
    const cudaError_t error = cudaLaunchKernel(fault_kernel, dim3(unsigned(x), unsigned(y), unsigned(z)),
                                               dim3(unsigned(threads)), arguments, size_t(shared), nullptr);
    remembered[0] = int(cudaGetLastError());
    remembered[1] = int(cudaGetLastError());
    return int(error);
}

PS_EXPORT int fault_allow(int device, int shared) {
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(fault_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    cudaGetLastError();
    return int(error);
}

PS_EXPORT const char* fault_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
PS_EXPORT const char* fault_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
