// Threads that serve one call: started once, they run one piece of work after the other.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "interrupt.h"

namespace patchscore {

class ThreadPool {
    Interrupt& interrupt;
    std::mutex mutex;
    std::condition_variable wake, idle;
    const std::function<void(int)>* work = nullptr;
    int64_t turn = 0;  // pieces of work handed out so far
    int working = 0;   // threads that have not finished the latest
    bool closing = false;
    std::exception_ptr failure;
    std::vector<std::thread> others;

public:
    // `threads` counts the calling thread. Where the system gives fewer, fewer serve.
    ThreadPool(int64_t threads, Interrupt& interrupt) : interrupt(interrupt) {
        others.reserve(size_t(std::max<int64_t>(threads, 1)));
        try {
            for (int64_t i = 1; i < threads; ++i) others.emplace_back([this, i] { serve(int(i)); });
        } catch (const std::system_error&) {
        }
    }

    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    ~ThreadPool() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            closing = true;
        }
        wake.notify_all();
        for (std::thread& other : others) other.join();
    }

    int size() const { return int(others.size()) + 1; }

    // Runs act(thread) on every thread and returns when all have finished; thread 0 is the calling one. The first
    // exception stops the others at their next check of the interrupt and is thrown again here.
    void run(const std::function<void(int)>& act) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            work = &act, working = int(others.size()), ++turn;
        }
        wake.notify_all();
        attempt(act, 0);
        std::unique_lock<std::mutex> lock(mutex);
        idle.wait(lock, [this] { return working == 0; });
        work = nullptr;
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }

    // act(i, thread) for i = 0 .. count - 1, each taken by the next free thread, until interrupted.
    template <typename Act>
    void each(int64_t count, Act act) {
        std::atomic<int64_t> next{0};
        run([&](int thread) {
            for (int64_t i; (i = next++) < count && !interrupt.stopped(thread == 0);) act(i, thread);
        });
    }

private:
    void serve(int thread) {
        for (int64_t done = 0;;) {
            const std::function<void(int)>* act;
            {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return closing || turn > done; });
                if (closing) return;
                act = work, done = turn;
            }
            attempt(*act, thread);
            const std::lock_guard<std::mutex> lock(mutex);
            if (--working == 0) idle.notify_one();
        }
    }

    void attempt(const std::function<void(int)>& act, int thread) noexcept {
        try {
            act(thread);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!failure) failure = std::current_exception();
            interrupt.stop = true;
        }
    }
};

}  // namespace patchscore
