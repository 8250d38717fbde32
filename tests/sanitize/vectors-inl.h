// The checks of csrc/common/vector-inl.h on one level: registers of float and of double, and wider vectors.
namespace float32 {
#include "../../csrc/common/vector-inl.h"
#include "check_vectors-inl.h"
}  // namespace float32
namespace float64 {
#define PS_DOUBLE
#include "../../csrc/common/vector-inl.h"
#include "check_vectors-inl.h"
}  // namespace float64
namespace sixteen {
#define PS_LANES 16
#include "../../csrc/common/vector-inl.h"
#include "check_vectors-inl.h"
}  // namespace sixteen

static void check() {
    float32::check_vectors();
    float64::check_vectors();
    sixteen::check_vectors();
}
