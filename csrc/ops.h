// The kernels, once per instruction set of the CPU, so that one module runs anywhere and is fast where it can be, and
// once for CUDA devices.
#pragma once

#include "types.h"

namespace gradroute {

// Sums over tokens are made in two stages: each run of so many tokens by itself, then the runs in order. So the result
// does not depend on the number of threads.
constexpr int64_t TOKENS_PER_SUM = 64;

namespace cpu_baseline {
#include "declarations.inc"
}
namespace cpu_avx2 {
#include "declarations.inc"
}
namespace cpu_avx512 {
#include "declarations.inc"
}
namespace cuda {
#include "declarations.inc"
}

}  // namespace gradroute
