// Compiles the file PS_KERNEL (a path from this folder) once per level, in a namespace of the level's name, with
// PS_LEVEL, the bits of a vector register. Include it inside the namespace that the levels shall live in.
#if defined(__x86_64__)

PS_BEGIN_TARGET(PS_AVX512)
namespace avx512 {
#define PS_LEVEL 512
#include PS_KERNEL
#undef PS_LEVEL
}  // namespace avx512
PS_END_TARGET

PS_BEGIN_TARGET(PS_AVX2)
namespace avx2 {
#define PS_LEVEL 256
#include PS_KERNEL
#undef PS_LEVEL
}  // namespace avx2
PS_END_TARGET

#endif  // x86-64

namespace plain {
#define PS_LEVEL 128
#include PS_KERNEL
#undef PS_LEVEL
}  // namespace plain

#undef PS_KERNEL
