// The masked product of a gradient: into a new matrix, or in place on the elements that a table changes.
#include "blocks.h"

namespace gradroute {
namespace {

// One token's features [first, first + n), on which m is the same; in place, m = 1 touches nothing.
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
void by_segments(const Matrix& g, const Matrix& out, const Routing& routing, const Table& table,
                 const Segments& segments) {
  const bool in_place = g.data == out.data;
#pragma omp parallel for schedule(static) if (g.rows * g.cols >= PARALLEL_FROM)
  for (int64_t token = 0; token < g.rows; ++token) {
    const Token<C> t(routing, token);
    int64_t done = 0;
    for (int64_t s = 0; s < segments.count; ++s) {
      const int64_t start = segments.bounds[2 * s], stop = segments.bounds[2 * s + 1];
      if (!in_place) scale_run(g, out, token, done, start, C(1));
      scale_run(g, out, token, start, stop, t.weight(table, start));
      done = stop;
    }
    if (!in_place) scale_run(g, out, token, done, g.cols, C(1));
  }
}

template <class C>
void by_features(const Matrix& g, const Matrix& out, const Routing& routing, const Table& table) {
  for_blocks(g.rows, g.cols, [&](int64_t token, int64_t first, int64_t n) {
    alignas(64) C scratch[BLOCK], product[BLOCK];
    const C* values = load(g, token, first, n, scratch);
    std::copy(values, values + n, product);
    apply_mask(table, Token<C>(routing, token), first, n, product);
    store(out, token, first, n, product);
  });
}

}  // namespace

namespace GRADROUTE_CPU {

void masked_product(Matrix g, Matrix out, Routing routing, Table table, Segments segments, Stream) {
  GRADROUTE_SWITCH_COMPUTE(g.dtype, {
    const int64_t all_features[] = {0, g.cols};
    if (table.cols == 1)  // one segment
      by_segments<C>(g, out, routing, table, {all_features, 1});
    else if (segments.count > 0)
      by_segments<C>(g, out, routing, table, segments);
    else
      by_features<C>(g, out, routing, table);
  });
}

}  // namespace GRADROUTE_CPU
}  // namespace gradroute
