// A GPU of one thread that is stricter than any GPU.
//
// Every thread of a block is a fiber. What threads do together is a rendezvous: those who come bring the same kind, mask
// and source line, and nobody may leave before. The kernels are compiled with the instrumentation of ThreadSanitizer and
// UndefinedBehaviorSanitizer, whose calls end here: every access to memory is checked against the launch's buffers and
// the block's shared memory, where bytes remember who read and wrote them since which barrier. What is wrong ends the
// launch with cudaErrorLaunchFailure and a text that names the kernel, the block, the thread and what it did.
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda_device.h"

dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0);

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // this library: constants, threadIdx

namespace emulation {
namespace {

constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = 64 << 10;
constexpr size_t SHARED = 227 << 10, MARGIN = 1 << 16;   // margins on both sides belong to nobody
constexpr size_t SHARED_WITHOUT_ATTRIBUTE = 48 << 10;
constexpr int REGISTERS = 1 << 16, REGISTER_UNIT = 256;  // of a multiprocessor; a warp takes whole units

// What the machine is, and how it chooses its order; set from Python.
struct Machine {
    int devices = 1, shared_optin = 227 << 10;
    bool only_checks = false;           // launches are checked, kernels do not run
    uint64_t blocks = 0;                // of the last launch that was accepted
    uint64_t seed = 0;                  // 0: warps, lanes and blocks in order; 1: in reverse; others: at random
    std::map<std::string, int> registers;
} machine;
std::mutex machine_lock;
std::map<std::pair<const void*, int>, int> attributes;  // by kernel and device: bytes of shared memory allowed

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local char failure[768] = "";

// A launch's buffer in global memory, and who wrote its bytes (thread of the grid + 1; allocated at the first write).
struct Buffer {
    uintptr_t start, end;
    std::vector<uint32_t> writers;
};
thread_local std::vector<Buffer> buffers;  // of the next launch from this thread of the host

enum class State { fresh, ready, waiting, done };

struct Fiber {
    ucontext_t context;
    jmp_buf here;
    bool started = false;
    State state = State::fresh;
    Kind kind = Kind::none;
    unsigned mask = 0;
    int line = 0;
    void* own = nullptr;
    uint32_t clock[32];     // what this lane knows of its warp's lanes: how often they had synchronized
};

// Who touched a byte of shared memory. Epochs count barriers and never return, so nothing needs clearing.
struct Touched {
    uint32_t write_epoch = 0, write_clock = 0, read_epoch = 0, read_clock = 0, readers = 0;
    int16_t writer = -1, reading_warp = -1;
};
constexpr int16_t SEVERAL_WARPS = -2;

struct Block {
    int threads = 0, warps = 0, left = 0;
    size_t shared_bytes = 0;
    const char* kernel = "";
    Body body;
    const void* function;
    const void* task;
    uint32_t epoch = 1, first_epoch = 1;
    int at_barrier = 0;
    uint64_t number = 0;    // of the block, for `writers`
    std::vector<Buffer>* buffers = nullptr;
    jmp_buf scheduler, escape;
};

std::mutex one_launch;
Block block;
bool running = false;       // a kernel runs: accesses are its own
Fiber* fibers = nullptr;
char* stacks = nullptr;
char* arena = nullptr;      // MARGIN, shared memory, MARGIN
Touched* touched = nullptr;
std::mt19937_64 chance;

const char* name_of(Kind kind) {
    switch (kind) {
        case Kind::multiply: return "a matrix product";
        case Kind::vote: return "a vote";
        case Kind::syncwarp: return "__syncwarp";
        case Kind::barrier: return "__syncthreads";
        default: return "nothing";
    }
}

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char* format, ...) {
    running = false;
    char what[512];
    va_list list;
    va_start(list, format);
    std::vsnprintf(what, sizeof what, format, list);
    va_end(list);
    std::snprintf(failure, sizeof failure, "%s, block (%u, %u, %u), warp %u, lane %u: %s", block.kernel, blockIdx.x,
                  blockIdx.y, blockIdx.z, threadIdx.x / 32, threadIdx.x % 32, what);
    _longjmp(block.escape, 1);
}

void pause_fiber() {
    Fiber& fiber = fibers[threadIdx.x];
    if (!_setjmp(fiber.here)) _longjmp(block.scheduler, 1);
}

void entry() {
    for (;;) {  // one turn a block
        running = true;
        block.body(block.function, block.task);
        running = false;
        const int own = int(threadIdx.x), first = own & ~31;
        fibers[own].state = State::done;
        ++block.left;
        for (int lane = 0; lane < 32; ++lane) {
            const Fiber& other = fibers[first + lane];
            if (other.state == State::waiting && other.kind != Kind::barrier && (other.mask >> (own & 31) & 1))
                fail("leaves while lane %d waits for it at %s (line %d)", lane, name_of(other.kind), other.line);
        }
        if (block.at_barrier) fail("leaves while %d threads wait for it at __syncthreads", block.at_barrier);
        pause_fiber();
    }
}

// Each lane brings a row of A in `a`, a column of B in `b`; PTX ISA, "Matrix fragments for mma.m16n8k32".
void multiply_warp(Fiber* warp) {
    alignas(32) int16_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& own = *static_cast<const patchscore::Fragments*>(warp[lane].own);
        for (int i = 0; i < 4; ++i) {
            for (int reg = 0; reg < 4; ++reg)
                a[lane / 4 + (reg % 2 ? 8 : 0)][lane % 4 * 4 + i + (reg >= 2 ? 16 : 0)] = int8_t(own.a[reg] >> (8 * i));
            for (int reg = 0; reg < 2; ++reg) b[lane / 4][lane % 4 * 4 + i + 16 * reg] = int8_t(own.b[reg] >> (8 * i));
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        int* d = static_cast<const patchscore::Fragments*>(warp[lane].own)->d;
        for (int reg = 0; reg < 4; ++reg) {
            const int row = lane / 4 + (reg >= 2 ? 8 : 0), col = lane % 4 * 2 + reg % 2;
            int sum = 0;
            for (int x = 0; x < 32; ++x) sum += a[row][x] * b[col][x];
            if (__builtin_add_overflow(d[reg], sum, &d[reg])) fail("a matrix product overflows an int");
        }
    }
}

void vote_warp(Fiber* warp) {
    bool any = false;
    for (int lane = 0; lane < 32; ++lane) any = any || *static_cast<const bool*>(warp[lane].own);
    for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(warp[lane].own) = any;
}

// Afterwards every lane of the mask knows what all of them did before.
void sync_lanes(Fiber* warp, unsigned mask) {
    uint32_t known[32] = {};
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1)
            for (int l = 0; l < 32; ++l) known[l] = std::max(known[l], warp[lane].clock[l]);
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) {
            std::memcpy(warp[lane].clock, known, sizeof known);
            ++warp[lane].clock[lane];
        }
}

// A lane of its warp waits elsewhere than at the barrier; what everybody does must be the same.
void barrier(int own, int line) {
    if (block.left) fail("comes to __syncthreads (line %d), %d threads have left", line, block.left);
    for (int thread = 0; thread < block.threads; ++thread) {
        const Fiber& other = fibers[thread];
        if (other.state != State::waiting) continue;
        if (other.kind != Kind::barrier && thread / 32 == own / 32)
            fail("comes to __syncthreads (line %d), lane %d waits at %s (line %d)", line, thread % 32, name_of(other.kind),
                 other.line);
        if (other.kind == Kind::barrier && other.line != line)
            fail("comes to __syncthreads in line %d, thread %d waits at that in line %d", line, thread, other.line);
    }
    fibers[own].state = State::waiting;
    if (++block.at_barrier < block.threads) return pause_fiber();
    block.at_barrier = 0, ++block.epoch;
    for (int thread = 0; thread < block.threads; ++thread) fibers[thread].state = State::ready;
}

}  // namespace

void together(Kind kind, unsigned mask, int line, void* data) {
    running = false;
    const int own = int(threadIdx.x), lane = own & 31;
    Fiber* const warp = fibers + (own & ~31);
    Fiber& fiber = fibers[own];
    fiber.kind = kind, fiber.mask = mask, fiber.line = line, fiber.own = data;
    if (kind == Kind::barrier) {
        barrier(own, line);
        running = true;
        return;
    }
    fiber.state = State::waiting;
    if (!(mask >> lane & 1)) fail("comes to %s (line %d) with mask %08x, which leaves it out", name_of(kind), line, mask);
    bool complete = true;
    for (int l = 0; l < 32; ++l) {
        const Fiber& other = warp[l];
        const bool waits = other.state == State::waiting;
        if (mask >> l & 1) {
            if (other.state == State::done)
                fail("comes to %s (line %d) with mask %08x, lane %d has left", name_of(kind), line, mask, l);
            if (waits && (other.kind != kind || other.mask != mask || other.line != line))
                fail("comes to %s (line %d, mask %08x), lane %d waits at %s (line %d, mask %08x)", name_of(kind), line,
                     mask, l, name_of(other.kind), other.line, other.mask);
            complete = complete && waits;
        } else if (waits && other.kind != Kind::barrier && (other.mask >> lane & 1)) {
            fail("comes to %s (line %d, mask %08x), lane %d waits for it at %s (line %d, mask %08x)", name_of(kind), line,
                 mask, l, name_of(other.kind), other.line, other.mask);
        }
    }
    if (complete) {
        if (kind == Kind::multiply) multiply_warp(warp);
        if (kind == Kind::vote) vote_warp(warp);
        if (kind == Kind::syncwarp) sync_lanes(warp, mask);
    }
    if (complete) {
        for (int l = 0; l < 32; ++l)
            if (mask >> l & 1) warp[l].state = State::ready;
    } else {
        pause_fiber();
    }
    running = true;
}

void* shared_memory() { return arena + MARGIN; }

namespace {

// Whether what a lane of the same warp did at its clock is known to `own`.
bool knows(const Fiber& own, int lane, uint32_t clock) { return own.clock[lane] >= clock; }

void check_shared(uintptr_t address, size_t size, bool writes) {
    const int own = int(threadIdx.x), warp = own / 32, lane = own % 32;
    const int64_t offset = int64_t(address) - int64_t(arena + MARGIN);
    if (offset < 0 || offset + int64_t(size) > int64_t(block.shared_bytes))
        fail("%s %zu bytes at %lld of shared memory, which has %zu", writes ? "writes" : "reads", size,
             (long long)offset, block.shared_bytes);
    const Fiber& fiber = fibers[own];
    for (size_t i = size_t(offset); i < size_t(offset) + size; ++i) {
        Touched& byte = touched[i];
        if (!writes && byte.write_epoch < block.first_epoch) fail("reads byte %zu of shared memory, which nobody wrote", i);
        const bool written = byte.write_epoch == block.epoch && byte.writer != own;
        if (written && !(byte.writer / 32 == warp && knows(fiber, byte.writer % 32, byte.write_clock)))
            fail("%s byte %zu of shared memory, which thread %d wrote with no barrier in between",
                 writes ? "writes" : "reads", i, byte.writer);
        const bool read = byte.read_epoch == block.epoch;
        if (writes) {
            if (read) {
                if (byte.reading_warp != warp)
                    fail("writes byte %zu of shared memory, which a thread of another warp read with no barrier in between", i);
                for (unsigned others = byte.readers & ~(1u << lane); others; others &= others - 1)
                    if (!knows(fiber, __builtin_ctz(others), byte.read_clock))
                        fail("writes byte %zu of shared memory, which lane %d read with no barrier in between", i,
                             __builtin_ctz(others));
                byte.read_epoch = 0;
            }
            byte.write_epoch = block.epoch, byte.write_clock = fiber.clock[lane], byte.writer = int16_t(own);
        } else if (!read) {
            byte.read_epoch = block.epoch, byte.read_clock = fiber.clock[lane];
            byte.readers = 1u << lane, byte.reading_warp = int16_t(warp);
        } else if (byte.reading_warp == warp) {
            byte.readers |= 1u << lane, byte.read_clock = std::max(byte.read_clock, fiber.clock[lane]);
        } else {
            byte.reading_warp = SEVERAL_WARPS;
        }
    }
}

void check(const void* pointer, size_t size, bool writes) {
    if (!running) return;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address - uintptr_t(stacks) < STACK * MOST_THREADS) return;
    if (address - uintptr_t(arena) < SHARED + 2 * MARGIN) return check_shared(address, size, writes);
    const uint32_t own = uint32_t(block.number * uint64_t(block.threads) + threadIdx.x + 1);
    for (Buffer& buffer : *block.buffers) {
        if (address < buffer.start || address + size > buffer.end) continue;
        if (writes && buffer.writers.empty()) buffer.writers.resize(buffer.end - buffer.start);
        if (!buffer.writers.empty())
            for (size_t i = address - buffer.start; i < address - buffer.start + size; ++i) {
                uint32_t& writer = buffer.writers[i];
                if (writer && writer != own)
                    fail("%s byte %zu of a buffer that another thread of this launch wrote", writes ? "writes" : "reads", i);
                if (writes) writer = own;
            }
        return;
    }
    if (!writes && address >= uintptr_t(&__ehdr_start) && address < uintptr_t(&_end)) return;
    const Buffer* nearest = nullptr;
    uintptr_t least = ~uintptr_t(0);
    for (const Buffer& buffer : *block.buffers) {
        const uintptr_t away = address < buffer.start ? buffer.start - address : address + size - buffer.end;
        if (away < least) least = away, nearest = &buffer;
    }
    if (!nearest) fail("%s global memory, of which this launch has none", writes ? "writes" : "reads");
    fail("%s %zu bytes at %lld of a buffer of %zu in global memory", writes ? "writes" : "reads", size,
         (long long)(address - nearest->start), size_t(nearest->end - nearest->start));
}

void run_fiber(int thread) {
    Fiber& fiber = fibers[thread];
    threadIdx.x = unsigned(thread);
    if (_setjmp(block.scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + size_t(thread) * STACK;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    setcontext(&fiber.context);
}

bool runs(const Fiber& fiber) { return fiber.state == State::fresh || fiber.state == State::ready; }

void run_block() {
    block.first_epoch = ++block.epoch;
    block.left = block.at_barrier = 0;
    std::memset(arena + MARGIN, 0xff, block.shared_bytes);  // as floats: NaN
    for (int thread = 0; thread < block.threads; ++thread) {
        fibers[thread].state = State::fresh;
        std::fill(std::begin(fibers[thread].clock), std::end(fibers[thread].clock), 1u);
        fibers[thread].clock[thread % 32] = 2;
    }
    const int turned = machine.seed == 1 ? 1 : 0;
    while (block.left < block.threads) {
        bool ran = false;
        const unsigned skipped = machine.seed > 1 ? unsigned(chance() % unsigned(block.warps)) : 0;
        for (int w = 0; w < block.warps; ++w) {
            const int warp = turned ? block.warps - 1 - w : int((unsigned(w) + skipped) % unsigned(block.warps));
            const int first = 32 * warp, lanes = std::min(32, block.threads - first);
            const unsigned rotated = machine.seed > 1 ? unsigned(chance()) : 0;
            bool warp_ran = false;
            for (int l = 0; l < lanes; ++l) {
                const unsigned at = (unsigned(l) + rotated) % unsigned(lanes);
                const int lane = (turned || rotated >> 31) ? lanes - 1 - int(at) : int(at);
                if (!runs(fibers[first + lane])) continue;
                run_fiber(first + lane);
                warp_ran = true;
            }
            ran = ran || warp_ran;
            if (!warp_ran) continue;
            if (machine.seed > 1 && chance() % 4 == 0) break;  // another warp, perhaps
            if (machine.seed <= 1) --w;                        // this warp, as far as it gets
            else if (chance() % 2) --w;
        }
        if (!ran && block.left < block.threads) fail("nobody can go on");
    }
}

const char* name_of_kernel(const void* kernel) {
    static std::map<const void*, std::string> names;
    std::string& name = names[kernel];
    if (name.empty()) {
        Dl_info info;
        int status = 1;
        const char* mangled = dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "a kernel";
        std::unique_ptr<char, void (*)(void*)> plain(abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
        name = status == 0 ? plain.get() : mangled;
        name = name.substr(0, name.find('('));
        if (const size_t from = name.find("patchscore::"); from != std::string::npos) name = name.substr(from + 12);
    }
    return name.c_str();
}

cudaError_t refused(cudaError_t error, const char* kernel, const char* why) {
    std::snprintf(failure, sizeof failure, "%s: %s", kernel, why);
    return last_error = error;
}

cudaError_t run_grid(dim3 grid, int threads) {
    const uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<uint64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (machine.seed == 1) std::reverse(order.begin(), order.end());
    chance.seed(machine.seed);
    if (machine.seed > 1) std::shuffle(order.begin(), order.end(), chance);
    static volatile size_t next;  // survives the jump
    next = 0;
    if (_setjmp(block.escape)) {
        for (int thread = 0; thread < threads; ++thread) fibers[thread].started = false;
        return last_error = cudaErrorLaunchFailure;
    }
    for (; next < count; next = next + 1) {
        block.number = order[next];
        blockIdx.x = unsigned(block.number % grid.x);
        blockIdx.y = unsigned(block.number / grid.x % grid.y);
        blockIdx.z = unsigned(block.number / grid.x / grid.y);
        run_block();
    }
    return cudaSuccess;
}

}  // namespace

cudaError_t launch(Body body, const void* kernel, const void* task, dim3 grid, dim3 threads, size_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(one_launch);
    const char* const name = name_of_kernel(kernel);
    const unsigned count = threads.x * threads.y * threads.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return refused(cudaErrorInvalidConfiguration, name, "the grid is empty, or beyond 2147483647 x 65535 x 65535");
    if (!count || count > unsigned(MOST_THREADS) || threads.z > 64 || count % 32)
        return refused(cudaErrorInvalidConfiguration, name, "a block takes 32 to 1024 threads in whole warps");
    size_t allowed = SHARED_WITHOUT_ATTRIBUTE;
    {
        const std::lock_guard<std::mutex> state(machine_lock);
        const auto found = attributes.find({kernel, device});
        if (found != attributes.end()) allowed = std::max(allowed, size_t(found->second));
    }
    if (shared_bytes > allowed) {
        char why[128];
        std::snprintf(why, sizeof why, "asks for %zu bytes of shared memory, %zu are allowed", shared_bytes, allowed);
        return refused(cudaErrorInvalidValue, name, why);
    }
    const auto registers = machine.registers.find(name);
    if (registers != machine.registers.end()) {
        const int warp = (registers->second * 32 + REGISTER_UNIT - 1) / REGISTER_UNIT * REGISTER_UNIT;
        if (warp * int((count + 31) / 32) > REGISTERS)
            return refused(cudaErrorLaunchOutOfResources, name, "a block takes more registers than there are");
    }
    machine.blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (machine.only_checks) return cudaSuccess;
    if (!fibers) {
        fibers = new Fiber[MOST_THREADS];
        stacks = new char[STACK * MOST_THREADS];
        arena = static_cast<char*>(std::aligned_alloc(4096, SHARED + 2 * MARGIN));
        touched = new Touched[SHARED];
    }
    block.threads = int(count), block.warps = int(count + 31) / 32;
    block.shared_bytes = shared_bytes, block.kernel = name;
    block.body = body, block.function = kernel, block.task = task;
    block.buffers = &buffers;
    for (Buffer& buffer : buffers) buffer.writers.clear();
    return run_grid(grid, int(count));
}

}  // namespace emulation

using emulation::machine;
using emulation::machine_lock;

cudaError_t cudaGetDeviceCount(int* count) { return *count = machine.devices, cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= machine.devices) return emulation::refused(cudaErrorInvalidDevice, "cudaSetDevice", "no such device");
    return emulation::device = device, cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    if (device < 0 || device >= machine.devices) return emulation::refused(cudaErrorInvalidDevice, "cudaDeviceGetAttribute", "no such device");
    return *value = machine.shared_optin, cudaSuccess;
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = emulation::last_error;
    emulation::last_error = cudaSuccess;
    return error;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : emulation::failure; }

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
        default: return "cudaErrorLaunchFailure";
    }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (value > machine.shared_optin)
        return emulation::refused(cudaErrorInvalidValue, "cudaFuncSetAttribute", "more shared memory than a block may have");
    {
        const std::lock_guard<std::mutex> lock(machine_lock);
        emulation::attributes[{kernel, emulation::device}] = value;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // another thread of the host comes in between
    return cudaSuccess;
}

// What Python sets.
extern "C" {

void emulation_reset(int devices, int shared_optin, uint64_t seed, int only_checks) {
    const std::lock_guard<std::mutex> lock(machine_lock);
    machine.devices = devices, machine.shared_optin = shared_optin;
    machine.seed = seed, machine.only_checks = only_checks != 0;
}

int emulation_last_error() { return emulation::last_error; }

uint64_t emulation_blocks() { return machine.blocks; }

void emulation_registers(const char* kernel, int registers) { machine.registers[kernel] = registers; }

// The buffers of this thread's next launches: nothing else may be read or written.
void emulation_buffers(int count, const uint64_t* starts, const uint64_t* bytes) {
    emulation::buffers.clear();
    for (int i = 0; i < count; ++i)
        if (bytes[i]) emulation::buffers.push_back({uintptr_t(starts[i]), uintptr_t(starts[i] + bytes[i]), {}});
}

// ThreadSanitizer's calls: every access to memory.
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* at, uint64_t size) { emulation::check(at, size, false); }
void __tsan_write_range(void* at, uint64_t size) { emulation::check(at, size, true); }
#define ACCESS(size)                                                                       \
    void __tsan_read##size(void* at) { emulation::check(at, size, false); }                \
    void __tsan_write##size(void* at) { emulation::check(at, size, true); }                \
    void __tsan_unaligned_read##size(void* at) { emulation::check(at, size, false); }      \
    void __tsan_unaligned_write##size(void* at) { emulation::check(at, size, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }

// UndefinedBehaviorSanitizer's calls.
struct Place {
    const char* file;
    uint32_t line, column;
};

#define OVERFLOWS(name, what)                                                                        \
    void __ubsan_handle_##name##_overflow(Place* at, uintptr_t, uintptr_t) {                         \
        if (emulation::running) emulation::fail(what " overflows an int (line %u)", at->line);       \
    }
OVERFLOWS(add, "a sum")
OVERFLOWS(sub, "a difference")
OVERFLOWS(mul, "a product")
OVERFLOWS(negate, "a negation")
OVERFLOWS(divrem, "a quotient")

void __ubsan_handle_type_mismatch_v1(Place* at, uintptr_t pointer) {
    if (emulation::running) emulation::fail("reads or writes at %p, which is not aligned (line %u)", (void*)pointer, at->line);
}
}
