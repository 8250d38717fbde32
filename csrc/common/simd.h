// Instruction sets: which ones kernels are compiled for, and which of them this machine has.
//
// A level names the features that its kernels may use, once: PS_BEGIN_TARGET gives that list to the compiler and
// `machine_has` asks the processor for the same list. each-level-inl.h compiles a kernel for all levels.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define PS_INLINE static inline __attribute__((always_inline))
#define PS_LAMBDA __attribute__((always_inline))
#define PS_INLINE_MEMBER inline __attribute__((always_inline))
#define PS_COLD static __attribute__((noinline, cold))
#define PS_RARELY(condition) __builtin_expect(condition, 0)
#define PS_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define PS_UNROLL _Pragma("unroll")
#define PS_BEGIN_TARGET(features) \
    PS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define PS_END_TARGET PS_PRAGMA(clang attribute pop)
#else
#define PS_UNROLL _Pragma("GCC unroll 16")
#define PS_BEGIN_TARGET(features) PS_PRAGMA(GCC push_options) PS_PRAGMA(GCC target(features))
#define PS_END_TARGET PS_PRAGMA(GCC pop_options)
// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake, and notes that vectors wider
// than a register have no fixed calling convention: functions that take them are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// One operation on each of a few independent vectors: written next to each other, their latencies overlap.
#define PS_EACH(count) PS_UNROLL for (int i = 0; i < (count); ++i)

// The levels, by the names that PATCHSCORE_SIMD takes. "plain" is what the compiler's default target has.
#define PS_AVX512 "avx512f,avx512dq,avx2,fma,f16c"
#define PS_AVX2 "avx2,fma,f16c"

namespace patchscore {

#if defined(__x86_64__)

// Whether the processor and the operating system have one feature, by the compiler's name for it.
inline bool has_feature(const std::string& name) {
    // Registers of CPUID leaf 1, and of leaf 7 with subleaves 0 and 1.
    unsigned ax, bx, cx, dx;
    const auto bit = [](unsigned word, int position) { return (word >> position & 1u) != 0; };
    const bool vectors = __builtin_cpu_supports("avx"), wide_vectors = __builtin_cpu_supports("avx512f");
    if (name == "f16c") return vectors && __get_cpuid(1, &ax, &bx, &cx, &dx) && bit(cx, 29);
    if (name == "fma") return vectors && __get_cpuid(1, &ax, &bx, &cx, &dx) && bit(cx, 12);
    if (name == "avxvnni") return vectors && __get_cpuid_count(7, 1, &ax, &bx, &cx, &dx) && bit(ax, 4);
    if (!__get_cpuid_count(7, 0, &ax, &bx, &cx, &dx)) return false;
    if (name == "avx2") return vectors && bit(bx, 5);
    if (name == "avx512f") return wide_vectors;
    if (name == "avx512dq") return wide_vectors && bit(bx, 17);
    if (name == "avx512bw") return wide_vectors && bit(bx, 30);
    if (name == "avx512vl") return wide_vectors && bit(bx, 31);
    if (name == "avx512vnni") return wide_vectors && bit(cx, 11);
    throw std::logic_error("no way to ask the machine for " + name);
}

// The same for a list of features, as PS_BEGIN_TARGET takes it.
inline bool has_features(const std::string& names) {
    for (size_t at = 0; at < names.size();) {
        const size_t end = std::min(names.find(',', at), names.size());
        if (!has_feature(names.substr(at, end - at))) return false;
        at = end + 1;
    }
    return true;
}

#endif  // x86-64

inline bool machine_has(const std::string& level) {
#if defined(__x86_64__)
    if (level == "avx512") return has_features(PS_AVX512);
    if (level == "avx2") return has_features(PS_AVX2);
#endif
    return level == "plain";
}

// The first of `levels` (each with a name, the widest first) that the machine has and that `wanted`, if not "", names.
template <typename Level, int COUNT>
const Level& choose_level(const Level (&levels)[COUNT], const std::string& wanted) {
    std::string known;
    for (const Level& level : levels) {
        if (!machine_has(level.name)) continue;
        if (wanted.empty() || wanted == level.name) return level;
        known += (known.empty() ? "" : ", ") + std::string(level.name);
    }
    throw std::invalid_argument("PATCHSCORE_SIMD: got \"" + wanted + "\", this machine takes " + known);
}

// Rounds results below 2^-126 to zero while it lives: as weights they are nothing, and slow.
class FlushSubnormals {
#if defined(__x86_64__)
    static constexpr unsigned FLUSH_RESULTS = 0x8000, FLUSH_OPERANDS = 0x0040;
    unsigned saved = _mm_getcsr();

public:
    FlushSubnormals() { _mm_setcsr(saved | FLUSH_RESULTS | FLUSH_OPERANDS); }
    ~FlushSubnormals() { _mm_setcsr(saved); }
#else
public:
    FlushSubnormals() {}
#endif
};

}  // namespace patchscore
