// float16 as in CUDA's header of this name, with the conversions of the CPU kernels.
#pragma once

#include "math.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return gradroute::from_float16(x.bits); }
inline __half __float2half_rn(float x) { return {gradroute::to_float16(x)}; }
