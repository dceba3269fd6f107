// The kernels, once per instruction set of the CPU, so that one module runs anywhere and is fast where it can be, and
// once for CUDA devices.
#pragma once

#include "types.h"

namespace gradroute {

// Sums over tokens are made in two stages: each run of this many tokens by itself, then the runs in order. So the
// result does not depend on the number of threads.
constexpr int64_t TOKENS_PER_SUM = 64;

#define GRADROUTE_DECLARE(name, Operands) void name(const Operands& p, const Stream& stream);

namespace cpu_baseline {
#define KERNEL GRADROUTE_DECLARE
#include "kernels.inc"
}  // namespace cpu_baseline
namespace cpu_avx2 {
#define KERNEL GRADROUTE_DECLARE
#include "kernels.inc"
}  // namespace cpu_avx2
namespace cpu_avx512 {
#define KERNEL GRADROUTE_DECLARE
#include "kernels.inc"
}  // namespace cpu_avx512
namespace cuda {
#define KERNEL GRADROUTE_DECLARE
#define CUDA_KERNEL GRADROUTE_DECLARE
#include "kernels.inc"
}  // namespace cuda

#undef GRADROUTE_DECLARE

}  // namespace gradroute
