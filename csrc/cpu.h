// The parts that all CPU kernels share. A kernel walks over rows in blocks of features that fit into the first-level
// cache, converted to fp32 (fp64 for fp64) on the way in and rounded once on the way out. The loops are written for the
// compiler's vectoriser, and every source is compiled once per instruction set.
//
// Conversions and activations are compiled in cpu.cpp alone. A call costs nothing beside 256 elements, and inlined
// wherever they are called, they made compiling take six times as long.
#pragma once

#include <algorithm>

#include "math.h"
#include "ops.h"

namespace gradroute::GRADROUTE_CPU {

constexpr int64_t BLOCK = 256;

// Work below this many elements is not worth waking other threads for.
constexpr int64_t PARALLEL_FROM = 1 << 15;

// The address of [row, col] in a matrix whose elements have `size` bytes.
inline char* address(const Matrix& m, int64_t row, int64_t col, int64_t size) {
  return static_cast<char*>(m.data) + (row * m.row_stride + col * m.col_stride) * size;
}

// The elements [row, first .. first + n), converted into `to`.
template <class C>
void convert(const Matrix& m, int64_t row, int64_t first, int64_t n, C* to);

// The elements [row, first .. first + n) in C: in place where memory holds exactly that, else converted into `scratch`.
template <class C>
inline const C* load(const Matrix& m, int64_t row, int64_t first, int64_t n, C* scratch) {
  if (sizeof(C) == sizeof(float) && m.dtype == Dtype::float32 && m.col_stride == 1)
    return reinterpret_cast<const C*>(address(m, row, first, sizeof(C)));
  convert(m, row, first, n, scratch);
  return scratch;
}

// Rounds n values to m's dtype at [row, first .. first + n).
template <class C>
void round_into(const Matrix& m, int64_t row, int64_t first, int64_t n, const C* values);

// Stores n values at [row, first .. first + n), each rounded to m's dtype.
template <class C>
inline void store(const Matrix& m, int64_t row, int64_t first, int64_t n, const C* values) {
  if (sizeof(C) != sizeof(float) || m.dtype != Dtype::float32 || m.col_stride != 1)
    return round_into(m, row, first, n, values);
  C* to = reinterpret_cast<C*>(address(m, row, first, sizeof(C)));
  // A loop: std::copy calls memmove, with which a gated MLP's backward took 1.2 times as long (fp32, 512 × 1536, AVX2).
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = values[i];
}

// Rounds values to a dtype and back.
template <class C>
void round_to(Dtype dtype, int64_t n, C* values);

// act(a) and act'(a).
template <class C>
void activate(Activation activation, int64_t n, const C* a, C* value, C* derivative);

// A token's route and strength.
template <class C>
struct Token {
  int64_t route;
  C strength;
  bool has_strength;

  Token(const Routing& routing, int64_t token)
      : route(routing.ids[token]), strength(1), has_strength(routing.strength != nullptr) {
    if (!has_strength) return;
    const int64_t at = token * routing.strength_stride;
    strength = routing.strength_is_double ? C(static_cast<const double*>(routing.strength)[at])
                                          : C(static_cast<const float*>(routing.strength)[at]);
  }

  // m at one feature.
  C weight(const Table& table, int64_t feature) const {
    const int64_t column = table.cols == 1 ? 0 : feature;
    const C own = C(table.weights[route * table.cols + column]);
    return has_strength ? interpolated(C(table.weights[column]), own, strength) : own;
  }
};

// values = m values; exactly 0 where m is 0.
template <class C>
inline void scale(C m, int64_t n, C* values) {
  if (m == C(1)) return;
  if (m == C(0)) {
    std::fill(values, values + n, C(0));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] *= m;
}

// values = m ⊙ values for the features [first, first + n) of a token; nothing without a table.
template <class C>
inline void apply_mask(const Table& table, const Token<C>& token, int64_t first, int64_t n, C* values) {
  if (table.weights == nullptr) return;
  if (table.cols == 1) {
    scale(token.weight(table, 0), n, values);
    return;
  }
  const float* own = table.weights + token.route * table.cols + first;
  if (!token.has_strength) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) values[i] = masked(C(own[i]), values[i]);
    return;
  }
  const float* base = table.weights + first;
  const C strength = token.strength;  // a copy, which stores to `values` cannot change
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] = masked(interpolated(C(base[i]), C(own[i]), strength), values[i]);
}

// Applies several masks, one after the other, up to the first that is absent.
template <class C>
inline void apply_masks(const UpToMost<Table>& tables, const Token<C>& token, int64_t first, int64_t n, C* values) {
  for (const Table& table : tables) {
    if (table.weights == nullptr) return;
    apply_mask(table, token, first, n, values);
  }
}

// Adds n values to a row of sums, which hold C.
template <class C>
inline void add_to(const Matrix& sums, int64_t row, int64_t first, int64_t n, const C* values) {
  C* total = reinterpret_cast<C*>(address(sums, row, first, sizeof(C)));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) total[i] += values[i];
}

// Fills a row of sums with zeros; nothing where they are absent.
template <class C>
inline void clear(const Matrix& sums, int64_t row) {
  if (sums.data == nullptr) return;
  C* total = reinterpret_cast<C*>(address(sums, row, 0, sizeof(C)));
  std::fill(total, total + sums.cols, C(0));
}

// Calls body(token, first, n) for every block of a [tokens, features] matrix, and begin(run) before each run of
// TOKENS_PER_SUM tokens. Runs are shared among threads, so sums over a run belong to one thread and are made in order.
template <class Begin, class Body>
inline void for_blocks(int64_t tokens, int64_t features, const Begin& begin, const Body& body) {
  const int64_t runs = (tokens + TOKENS_PER_SUM - 1) / TOKENS_PER_SUM;
#pragma omp parallel for schedule(static) if (tokens * features >= PARALLEL_FROM)
  for (int64_t run = 0; run < runs; ++run) {
    begin(run);
    const int64_t last = std::min(tokens, (run + 1) * TOKENS_PER_SUM);
    for (int64_t token = run * TOKENS_PER_SUM; token < last; ++token)
      for (int64_t first = 0; first < features; first += BLOCK) body(token, first, std::min(BLOCK, features - first));
  }
}

template <class Body>
inline void for_blocks(int64_t tokens, int64_t features, const Body& body) {
  for_blocks(tokens, features, [](int64_t) {}, body);
}

// Runs the statements with C the type in which a gradient of this dtype is computed.
#define GRADROUTE_SWITCH_COMPUTE(dtype, ...) \
  if ((dtype) == Dtype::float64) {           \
    using C = double;                        \
    __VA_ARGS__;                             \
  } else {                                   \
    using C = float;                         \
    __VA_ARGS__;                             \
  }

}  // namespace gradroute::GRADROUTE_CPU
