// The masked product of a gradient: into a new matrix, or in place on the elements that a table changes.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

// out = m g for a token's features [first, last), which have one m; in place, m = 1 touches nothing.
template <class C>
void scale_run(const Matrix& g, const Matrix& out, int64_t token, int64_t first, int64_t last, C m) {
  if (m == C(1) && g.data == out.data) return;
  alignas(64) C product[BLOCK];
  for (; first < last; first += BLOCK) {
    const int64_t n = std::min(BLOCK, last - first);
    if (m == C(0)) {
      std::fill(product, product + n, C(0));
      store(out, token, first, n, product);
      continue;
    }
    const C* values = load(g, token, first, n, product);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) product[i] = m * values[i];
    store(out, token, first, n, product);
  }
}

template <class C>
void by_segments(const ProductOperands& p, const Segments& segments) {
  const Matrix &g = p.g, &out = p.out;
  const bool in_place = g.data == out.data;
#pragma omp parallel for schedule(static) if (g.rows * g.cols >= PARALLEL_FROM)
  for (int64_t token = 0; token < g.rows; ++token) {
    const Token<C> t(p.mask.routing, token);
    int64_t done = 0;
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t start = segments.bounds[2 * s], stop = segments.bounds[2 * s + 1];
      if (!in_place) scale_run(g, out, token, done, start, C(1));
      scale_run(g, out, token, start, stop, t.weight(p.mask.table, start));
      done = stop;
    }
    if (!in_place) scale_run(g, out, token, done, g.cols, C(1));
  }
}

template <class C>
void by_features(const ProductOperands& p) {
  for_blocks(p.g.rows, p.g.cols, [&](int64_t token, int64_t first, int64_t n) {
    alignas(64) C scratch[BLOCK], product[BLOCK];
    const C* values = load(p.g, token, first, n, scratch);
    std::copy(values, values + n, product);
    apply_mask(p.mask.table, Token<C>(p.mask.routing, token), first, n, product);
    store(p.out, token, first, n, product);
  });
}

}  // namespace

void masked_product(const ProductOperands& p, const Stream&) {
  GRADROUTE_SWITCH_COMPUTE(p.g.dtype, {
    const int64_t all_features[] = {0, p.g.cols};
    if (p.mask.table.cols == 1)  // the whole row is one segment
      by_segments<C>(p, {all_features, 1});
    else if (p.segments.count > 0)
      by_segments<C>(p, p.segments);
    else
      by_features<C>(p);
  });
}

}  // namespace gradroute::GRADROUTE_CPU
