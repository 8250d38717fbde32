// Holds csrc/common to plain definitions, on every instruction set: exp2_scaled against std::exp2, the other vector
// operations against loops, the thread pool against what it promises. Runs under AddressSanitizer and UBSan.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "../../csrc/common/memory.h"
#include "../../csrc/common/simd.h"
#include "../../csrc/common/threads.h"

#define REQUIRE(condition)                                              \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                               \
        }                                                               \
    } while (false)

using patchscore::Buffer;
using patchscore::Interrupt;
using patchscore::ThreadPool;

#define PS_KERNEL "../../tests/sanitize/vectors-inl.h"
#include "../../csrc/common/each-level-inl.h"

struct Level {
    const char* name;
    void (*check)();
};

static const Level LEVELS[] = {
#if defined(__x86_64__)
    {"avx512", avx512::check},
    {"avx2", avx2::check},
#endif
    {"plain", plain::check},
};

static void check_threads() {
    for (const int threads : {1, 2, 5}) {
        Interrupt interrupt;
        ThreadPool pool(threads, interrupt);
        std::vector<std::atomic<int>> times(1000);
        for (int round = 0; round < 50; ++round)
            pool.each(int64_t(times.size()), [&](int64_t i, int) { ++times[size_t(i)]; });
        for (const std::atomic<int>& count : times) REQUIRE(count == 50);
        bool thrown = false;
        try {
            pool.each(100, [](int64_t i, int) {
                if (i == 7) throw std::runtime_error("seven");
            });
        } catch (const std::runtime_error&) {
            thrown = true;
        }
        REQUIRE(thrown && interrupt.stop);
    }
    Interrupt interrupt;
    interrupt.poll = [] { return true; };
    ThreadPool pool(2, interrupt);
    std::atomic<int> served{0};
    pool.each(1 << 20, [&](int64_t, int) { ++served; });
    REQUIRE(served < 1 << 20);
}

static void check_memory() {
    for (const int64_t count : {0, 1, 17, 1000}) {
        Buffer<float> buffer(count);
        REQUIRE(reinterpret_cast<uintptr_t>(buffer.get()) % 64 == 0);
        for (int64_t i = 0; i < count; ++i) REQUIRE(buffer.get()[i] == 0);
        const float* const before = buffer.get();
        REQUIRE(buffer.room(count) == before && buffer.size() == count);
        buffer.room(count + 1)[count] = 1;
    }
}

int main() {
    int levels = 0;
    for (const Level& level : LEVELS)
        if (patchscore::machine_has(level.name)) level.check(), ++levels;
    check_threads();
    check_memory();
    std::printf("vectors on %d levels, threads, memory: no complaint\n", levels);
    return 0;
}
