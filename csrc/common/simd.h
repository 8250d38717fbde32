// Which instruction sets a kernel is compiled for and which of them this machine has.
#pragma once

#include <stdexcept>
#include <string>

namespace patchscore {

inline bool machine_has(const std::string& level) {
#if defined(__x86_64__)
    if (level == "avx512") return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (level == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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

}  // namespace patchscore
