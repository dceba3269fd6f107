// The arithmetic that CPU and CUDA kernels share: masks, activations, rounding. The namespace has no name, because
// files compiled for different instruction sets must not share its instances.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__CUDACC__)
#define GRADROUTE_INLINE __host__ __device__ __forceinline__
#else
#define GRADROUTE_INLINE inline __attribute__((always_inline))
#endif

namespace gradroute {
namespace {

// Interpolates as torch.lerp does, so that a strength of 1 is exactly no strength.
template <class C>
GRADROUTE_INLINE C interpolated(C base, C weight, C strength) {
  const C difference = weight - base;
  return (strength < C(0.5) && strength > C(-0.5)) ? base + strength * difference
                                                   : weight - difference * (C(1) - strength);
}

// m g, which is exactly 0 where m is 0, whatever g is.
template <class C>
GRADROUTE_INLINE C masked(C m, C g) {
  return m == C(0) ? C(0) : m * g;
}

template <class To, class From>
GRADROUTE_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

GRADROUTE_INLINE float from_bfloat16(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

// Rounds to the nearest, ties to even; NaN stays NaN.
GRADROUTE_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

GRADROUTE_INLINE float from_float16(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7FFFu) << 13;
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  // Scaling by 2^112 moves the exponent's bias and makes subnormals normal; infinity and NaN keep all exponent bits.
  const float scaled = bits_as<float>(magnitude) * 0x1p112f;
  const uint32_t finite = bits_as<uint32_t>(scaled);
  return bits_as<float>(sign | (magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite));
}

// Rounds to the nearest, ties to even; a number that is too large becomes infinity, and NaN stays NaN.
GRADROUTE_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 shifts a subnormal half's bits to the end of the significand, rounded by the addition.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return uint16_t(sign | (magnitude >= 0x477FF000u ? large : finite));
}

#if defined(__CUDA_ARCH__)
GRADROUTE_INLINE float exponential(float x) { return expf(x > 88.3f ? 88.3f : x); }
// 1 / x to 1 unit in the last place for x from 1 on; 0 from 2^126 on. It is the GPU's instruction alone: __fdividef
// scales its operand and its result in four instructions more, so as to keep subnormal numbers.
GRADROUTE_INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
GRADROUTE_INLINE float reciprocal(float x) { return 1.0f / x; }
// e^x to 2 units in the last place, by operations that a compiler can vectorise; x is clamped to [-87.3, 88.3].
GRADROUTE_INLINE float exponential(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // + 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float fraction = p * (r * r) + r + 1.0f;
  return fraction * bits_as<float>((bits_as<uint32_t>(shifted) + 127u) << 23);  // the low bits of shifted are n
}
#endif
GRADROUTE_INLINE double exponential(double x) { return exp(x > 700.0 ? 700.0 : x); }  // finite, as in fp32
GRADROUTE_INLINE double reciprocal(double x) { return 1.0 / x; }

// s = 1 / (1 + e^-a) and 1 - s, each to its own last place.
template <class C>
GRADROUTE_INLINE void sigmoid(C a, C& s, C& complement) {
  const C e = exponential(-a);
  s = reciprocal(C(1) + e);
  complement = e * s;
}

GRADROUTE_INLINE double standard_normal_cdf(double a) { return 0.5 * erfc(-a * 0.70710678118654752440); }

#if defined(__CUDA_ARCH__)
GRADROUTE_INLINE float standard_normal_cdf(float a) { return 0.5f + 0.5f * erff(a * 0.70710678118654752440f); }
#else
// Φ(a) by erf, which is an odd polynomial near 0 and 1 - e^polynomial beyond; absolute error below 1e-7.
GRADROUTE_INLINE float standard_normal_cdf(float a) {
  const float x = a * 0.70710678118654752440f;
  const float size = x < 0.0f ? -x : x;
  const float square = size * size;
  // Both polynomials are least-squares fits at Chebyshev nodes, to erf(x) / x in x² and to log(erfc(x)) in x.
  float near = 7.882497448e-05f;
  near = near * square - 8.018855006e-04f;
  near = near * square + 5.189312156e-03f;
  near = near * square - 2.685432881e-02f;
  near = near * square + 1.128359735e-01f;
  near = near * square - 3.761262596e-01f;
  near = near * square + 1.128379107e+00f;
  const float t = size > 4.2f ? 4.2f : size;
  float far = 1.540109906e-06f;
  far = far * t - 4.416502270e-05f;
  far = far * t + 5.810946459e-04f;
  far = far * t - 4.687298089e-03f;
  far = far * t + 2.621981315e-02f;
  far = far * t - 1.097334251e-01f;
  far = far * t - 6.321858764e-01f;
  far = far * t - 1.130027890e+00f;
  far = far * t + 2.706694067e-04f;
  const float erf = size < 1.0f ? near * size : 1.0f - exponential(far);
  return 0.5f + (x < 0.0f ? -0.5f : 0.5f) * erf;
}
#endif

// act(a) and act'(a). relu and relu2 have derivative 0 at 0 and keep NaN, as in PyTorch.
template <Activation activation, class C>
GRADROUTE_INLINE void value_and_derivative(C a, C& value, C& derivative) {
  if (activation == Activation::silu) {
    C s, complement;
    sigmoid(a, s, complement);
    value = a * s;
    derivative = s * (C(1) + a * complement);
  } else if (activation == Activation::gelu) {
    const C cdf = standard_normal_cdf(a);
    value = a * cdf;
    derivative = cdf + a * C(0.39894228040143267794) * exponential(C(-0.5) * a * a);
  } else if (activation == Activation::gelu_tanh || activation == Activation::gelu_fast) {
    // sqrt(2 / pi), of which gelu_fast has ten digits; in fp32 they are one number.
    constexpr C slope = activation == Activation::gelu_fast ? C(0.7978845608) : C(0.79788456080286535588);
    constexpr C cubic = C(0.044715);
    C s, complement;
    sigmoid(C(2) * slope * (a + cubic * a * a * a), s, complement);  // (1 + tanh(u)) / 2 and (1 - tanh(u)) / 2
    value = a * s;
    derivative = s + a * C(2) * s * complement * slope * (C(1) + C(3) * cubic * a * a);
  } else if (activation == Activation::relu) {
    value = a <= C(0) ? C(0) : a;
    derivative = a <= C(0) ? C(0) : C(1);
  } else {
    const C positive = a <= C(0) ? C(0) : a;
    value = positive * positive;
    derivative = C(2) * positive;
  }
}

// Runs the statements with the constant ACTIVATION, which stands for an activation that is only known at run time.
#define GRADROUTE_SWITCH_ACTIVATION(activation, ...)           \
  switch (activation) {                                        \
    case Activation::silu: {                                   \
      constexpr Activation ACTIVATION = Activation::silu;      \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    case Activation::gelu: {                                   \
      constexpr Activation ACTIVATION = Activation::gelu;      \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    case Activation::gelu_tanh: {                              \
      constexpr Activation ACTIVATION = Activation::gelu_tanh; \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    case Activation::gelu_fast: {                              \
      constexpr Activation ACTIVATION = Activation::gelu_fast; \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    case Activation::relu: {                                   \
      constexpr Activation ACTIVATION = Activation::relu;      \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
    case Activation::relu2: {                                  \
      constexpr Activation ACTIVATION = Activation::relu2;     \
      __VA_ARGS__;                                             \
      break;                                                   \
    }                                                          \
  }

// A step's options, the same for every element. The old averages have weight β, and the new values 1 - β.
template <class C>
struct AdamW {
  C beta2, average_weight, square_weight, eps, sign;

  AdamW(double beta1, double beta2, double eps, bool maximize)
      : beta2(C(beta2)),
        average_weight(C(1.0 - beta1)),
        square_weight(C(1.0 - beta2)),
        eps(C(eps)),
        sign(maximize ? C(-1) : C(1)) {}
};

// A step's factors, the same for every element of a block of parameters.
template <class C>
struct BlockFactors {
  C decay, size, scale;  // 1 - lr λ, lr / (1 - β₁^t), 1 / √(1 - β₂^t)
};

// One element's step. `largest` is the largest v so far, where it counts.
template <class C>
GRADROUTE_INLINE void adamw(const AdamW<C>& options, const BlockFactors<C>& block, bool has_largest, C g, C& p, C& m,
                            C& v, C& largest) {
  g *= options.sign;
  m = interpolated(m, g, options.average_weight);
  v = options.beta2 * v + options.square_weight * g * g;
  C square = v;
  if (has_largest) {
    if (v > largest || v != v) largest = v;
    square = largest;
  }
  p = p * block.decay - block.size * m / (std::sqrt(square) * block.scale + options.eps);
}

// 32 random bits for an element's step, the same wherever the element lies: a hash (the multipliers are those of
// xxHash, the mixing is MurmurHash3's) of what it is before the step, of its gradient and of the number of its block's
// steps.
GRADROUTE_INLINE uint32_t random_bits(float g, float p, float m, float v, float count) {
  uint32_t h = bits_as<uint32_t>(g) * 0x9E3779B1u ^ bits_as<uint32_t>(p) * 0x85EBCA77u;
  h ^= bits_as<uint32_t>(m) * 0xC2B2AE3Du ^ bits_as<uint32_t>(v) * 0x27D4EB2Fu;
  h += uint32_t(int32_t(count)) * 0x165667B1u;
  h = (h ^ h >> 16) * 0x85EBCA6Bu;
  h = (h ^ h >> 13) * 0xC2B2AE35u;
  return h ^ h >> 16;
}

// x rounded to a bfloat16 below or above it, whose expectation over the 16 random bits is x. Infinity and NaN are
// themselves, and so is what is a bfloat16 already.
GRADROUTE_INLINE float to_bfloat16_by(uint32_t random, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
  return is_finite ? bits_as<float>((bits + (random & 0xFFFFu)) & 0xFFFF0000u) : x;
}

}  // namespace
}  // namespace gradroute
