// The floating types that kernels take.
#pragma once

namespace exssnet::cpu {

enum class Float { float16, bfloat16, float32, float64 };

}  // namespace exssnet::cpu
