// Compiles the header named EXSSNET_BODY once per instruction set, for EXSSNET_PICK (see dispatch.h) to choose from.
// The body finds kVectorBytes, the width of a register, Vector, which fills it, and kVectors, the sums that may live in
// registers. A file has one body.

namespace baseline {
constexpr int kVectorBytes = 16, kVectors = 8;
#include "cpu/vector_body.h"
#include EXSSNET_BODY
}  // namespace baseline
#if EXSSNET_X86
EXSSNET_AVX2_BEGIN
namespace avx2 {
constexpr int kVectorBytes = 32, kVectors = 8;
#include "cpu/vector_body.h"
#include EXSSNET_BODY
}  // namespace avx2
EXSSNET_TARGET_END
EXSSNET_AVX512_BEGIN
namespace avx512 {
constexpr int kVectorBytes = 64, kVectors = 16;
#include "cpu/vector_body.h"
#include EXSSNET_BODY
}  // namespace avx512
EXSSNET_TARGET_END
#endif
#undef EXSSNET_BODY
