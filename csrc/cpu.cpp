// Blocks of features: conversions and activations, in fp32 and fp64.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {

template <class C>
void convert(const Matrix& m, int64_t row, int64_t first, int64_t n, C* to) {
  const int64_t stride = m.col_stride;
  switch (m.dtype) {
    case Dtype::float32: {
      const float* from = reinterpret_cast<const float*>(address(m, row, first, 4));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = C(from[i * stride]);
      break;
    }
    case Dtype::float64: {
      const double* from = reinterpret_cast<const double*>(address(m, row, first, 8));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = C(from[i * stride]);
      break;
    }
    case Dtype::bfloat16: {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(address(m, row, first, 2));
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = C(from_bfloat16(from[i]));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = C(from_bfloat16(from[i * stride]));
      }
      break;
    }
    case Dtype::float16: {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(address(m, row, first, 2));
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = C(from_float16(from[i]));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = C(from_float16(from[i * stride]));
      }
      break;
    }
  }
}

template <class C>
void round_into(const Matrix& m, int64_t row, int64_t first, int64_t n, const C* values) {
  const int64_t stride = m.col_stride;
  switch (m.dtype) {
    case Dtype::float32: {
      float* to = reinterpret_cast<float*>(address(m, row, first, 4));
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = float(values[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i * stride] = float(values[i]);
      }
      break;
    }
    case Dtype::float64: {
      double* to = reinterpret_cast<double*>(address(m, row, first, 8));
      for (int64_t i = 0; i < n; ++i) to[i * stride] = double(values[i]);
      break;
    }
    case Dtype::bfloat16: {
      uint16_t* to = reinterpret_cast<uint16_t*>(address(m, row, first, 2));
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(float(values[i]));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i * stride] = to_bfloat16(float(values[i]));
      }
      break;
    }
    case Dtype::float16: {
      uint16_t* to = reinterpret_cast<uint16_t*>(address(m, row, first, 2));
      if (stride == 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = to_float16(float(values[i]));
      } else {
        for (int64_t i = 0; i < n; ++i) to[i * stride] = to_float16(float(values[i]));
      }
      break;
    }
  }
}

template <class C>
void round_to(Dtype dtype, int64_t n, C* values) {
  if (dtype == Dtype::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = C(from_bfloat16(to_bfloat16(float(values[i]))));
  } else if (dtype == Dtype::float16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = C(from_float16(to_float16(float(values[i]))));
  }
}

template <Activation activation, class C>
inline void activate(int64_t n, const C* a, C* value, C* derivative) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) value_and_derivative<activation>(a[i], value[i], derivative[i]);
}

template <class C>
void activate(Activation activation, int64_t n, const C* a, C* value, C* derivative) {
  GRADROUTE_SWITCH_ACTIVATION(activation, activate<ACTIVATION>(n, a, value, derivative));
}

#define GRADROUTE_INSTANTIATE(C)                                                \
  template void convert(const Matrix&, int64_t, int64_t, int64_t, C*);          \
  template void round_into(const Matrix&, int64_t, int64_t, int64_t, const C*); \
  template void round_to(Dtype, int64_t, C*);                                   \
  template void activate(Activation, int64_t, const C*, C*, C*);

GRADROUTE_INSTANTIATE(float)
GRADROUTE_INSTANTIATE(double)

}  // namespace gradroute::GRADROUTE_CPU
