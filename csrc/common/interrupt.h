// The check whether the caller wants a running call to stop.
#pragma once

#include <atomic>
#include <chrono>

namespace patchscore {

// Called now and then on the calling thread; true asks to stop.
using Poll = bool (*)();

// Stops all threads: asked by `poll`, which only the calling thread may run.
struct Interrupt {
    Poll poll = nullptr;
    std::atomic<bool> stop{false};
    std::chrono::steady_clock::time_point next{};
    unsigned calls = 0;  // of `stopped_soon` on the calling thread

    bool stopped(bool calling_thread) {
        if (calling_thread && poll) {
            const auto now = std::chrono::steady_clock::now();
            if (now >= next) {
                next = now + std::chrono::milliseconds(100);
                if (poll()) stop = true;
            }
        }
        return stop.load(std::memory_order_relaxed);
    }

    // The same between short pieces of work: reading a clock takes as long as some hundred pairs, so the calling thread
    // does at every sixteenth call.
    bool stopped_soon(bool calling_thread) {
        if (calling_thread && ++calls % 16 != 0) return stop.load(std::memory_order_relaxed);
        return stopped(calling_thread);
    }
};

}  // namespace patchscore
