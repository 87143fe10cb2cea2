// Compiles the header EXSSNET_BODY once per instruction set. EXSSNET_PICK (see dispatch.h) chooses one of them. The
// body may use kVectorBytes, the width of a register; Vector, a full register; Line; and kVectors, the number of sums
// that fit into registers. A file has one body.

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
