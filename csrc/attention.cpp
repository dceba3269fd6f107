// What routed attention needs beside an attention kernel: masks by (token, head), and delta = rowsum(do ⊙ o).
#include "blocks.h"

namespace gradroute {
namespace {

// The rows (batch, head) of x as a matrix [sequence, features].
Matrix head_of(const Heads& x, int64_t batch, int64_t head, int64_t element_size) {
  Matrix m;
  m.data = static_cast<char*>(x.data) + (batch * x.strides[0] + head * x.strides[1]) * element_size;
  m.rows = x.shape[2];
  m.cols = x.shape[3];
  m.row_stride = x.strides[2];
  m.col_stride = x.strides[3];
  m.dtype = x.dtype;
  return m;
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Calls body(batch, head, position) for every row of features.
template <class Body>
void for_rows(const Heads& x, const Body& body) {
#pragma omp parallel for collapse(2) \
    schedule(static) if (x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3] >= PARALLEL_FROM)
  for (int64_t batch = 0; batch < x.shape[0]; ++batch)
    for (int64_t head = 0; head < x.shape[1]; ++head)
      for (int64_t position = 0; position < x.shape[2]; ++position) body(batch, head, position);
}

template <class C>
C weight_of(const Table& table, const Token<C>& token, int64_t head) {
  return table.weights == nullptr ? C(1) : token.weight(table, head);
}

template <class C>
void mask_rows(const Heads& x, const Heads& out, const Routing& routing, const Table& table) {
  for_rows(x, [&](int64_t batch, int64_t head, int64_t position) {
    const C m = weight_of(table, Token<C>(routing, batch * x.shape[2] + position), head);
    if (m == C(1) && x.data == out.data) return;
    const Matrix from = head_of(x, batch, head, size_of(x.dtype)), to = head_of(out, batch, head, size_of(out.dtype));
    alignas(64) C scratch[BLOCK], product[BLOCK];
    for (int64_t first = 0; first < from.cols; first += BLOCK) {
      const int64_t n = std::min(BLOCK, from.cols - first);
      const C* values = load(from, position, first, n, scratch);
      std::copy(values, values + n, product);
      scale(m, n, product);
      store(to, position, first, n, product);
    }
  });
}

template <class C>
void delta_rows(const Heads& dz, const Heads& o, const Heads& d_o, const Matrix& delta, const Routing& routing,
                const Table& heads, const Table& forward_heads) {
  for_rows(dz, [&](int64_t batch, int64_t head, int64_t position) {
    const Token<C> token(routing, batch * dz.shape[2] + position);
    const C m_forward = weight_of(forward_heads, token, head), m_heads = weight_of(heads, token, head);
    const int64_t size = size_of(dz.dtype);
    const Matrix g = head_of(dz, batch, head, size), value = head_of(o, batch, head, size_of(o.dtype));
    alignas(64) C g_scratch[BLOCK], o_scratch[BLOCK], product[BLOCK];
    C total = 0;
    for (int64_t first = 0; first < g.cols; first += BLOCK) {
      const int64_t n = std::min(BLOCK, g.cols - first);
      const C* values = load(g, position, first, n, g_scratch);
      const C* o_values = load(value, position, first, n, o_scratch);
      std::copy(values, values + n, product);
      scale(m_forward, n, product);
      scale(m_heads, n, product);
      if (d_o.data != nullptr) store(head_of(d_o, batch, head, size_of(d_o.dtype)), position, first, n, product);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) total += product[i] * o_values[i];
    }
    store(delta, batch * dz.shape[1] + head, position, 1, &total);
  });
}

}  // namespace

namespace GRADROUTE_CPU {

void masked_heads(Heads x, Heads out, Routing routing, Table table, Stream) {
  GRADROUTE_SWITCH_COMPUTE(x.dtype, mask_rows<C>(x, out, routing, table));
}

void attention_delta(Heads dz, Heads o, Heads d_o, Matrix delta, Routing routing, Table heads, Table forward_heads,
                     Stream) {
  GRADROUTE_SWITCH_COMPUTE(dz.dtype, delta_rows<C>(dz, o, d_o, delta, routing, heads, forward_heads));
}

}  // namespace GRADROUTE_CPU
}  // namespace gradroute
