// The kernels of one level: windows in both precisions, and whole images.
namespace single {
#include "../common/vector-inl.h"
#include "kernel-inl.h"
}  // namespace single

namespace exact {
#define PS_DOUBLE
#include "../common/vector-inl.h"
#include "kernel-inl.h"
#include "whole-inl.h"
}  // namespace exact

constexpr Level level_named(const char* name) { return {name, single::KERNEL, exact::KERNEL, exact::whole}; }
