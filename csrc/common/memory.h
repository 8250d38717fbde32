// Memory for vectors: zeroed, and aligned for the widest of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace patchscore {

template <typename T>
class Buffer {
    static constexpr size_t ALIGNMENT = 64;  // bytes of an AVX-512 register, and of a cache line
    struct Free {
        void operator()(void* at) const { std::free(at); }
    };
    std::unique_ptr<T, Free> memory;
    int64_t count = 0;

public:
    Buffer() = default;

    explicit Buffer(int64_t count) : count(count) {
        const size_t bytes = (size_t(std::max<int64_t>(count, 1)) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        void* at = std::aligned_alloc(ALIGNMENT, bytes);
        if (!at) throw std::bad_alloc();
        std::memset(at, 0, bytes);
        memory.reset(static_cast<T*>(at));
    }

    T* get() const { return memory.get(); }
    int64_t size() const { return count; }

    // Room for `wanted` elements; what was in it is lost where it must grow.
    T* room(int64_t wanted) {
        if (wanted > count) *this = Buffer(wanted);
        return get();
    }
};

}  // namespace patchscore
