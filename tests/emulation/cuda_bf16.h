// bfloat16 as in CUDA's header of this name, with the conversions of the CPU kernels.
#pragma once

#include "math.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return gradroute::from_bfloat16(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {gradroute::to_bfloat16(x)}; }
