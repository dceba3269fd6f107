// Routed attention's own kernels beside those of attention: masks by (token, head), and delta = rowsum(do ⊙ o).
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The rows of one head of one batch, as a matrix [sequence, features].
Matrix head_of(const Heads& x, int64_t batch, int64_t head) {
  Matrix m;
  m.data = static_cast<char*>(x.data) + (batch * x.strides[0] + head * x.strides[1]) * size_of(x.dtype);
  m.rows = x.shape[2];
  m.cols = x.shape[3];
  m.row_stride = x.strides[2];
  m.col_stride = x.strides[3];
  m.dtype = x.dtype;
  return m;
}

// Calls body(batch, head, position) for every row of features.
template <class Body>
void for_rows(const Heads& x, const Body& body) {
#pragma omp parallel for collapse(2) \
    schedule(static) if (x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3] >= PARALLEL_FROM)
  for (int64_t batch = 0; batch < x.shape[0]; ++batch)
    for (int64_t head = 0; head < x.shape[1]; ++head)
      for (int64_t position = 0; position < x.shape[2]; ++position) body(batch, head, position);
}

// The weight of a head; 1 without a table.
template <class C>
C weight_of(const Table& table, const Token<C>& token, int64_t head) {
  return table.weights == nullptr ? C(1) : token.weight(table, head);
}

template <class C>
void mask_rows(const HeadOperands& p) {
  const Heads &x = p.x, &out = p.out;
  for_rows(x, [&](int64_t batch, int64_t head, int64_t position) {
    const C m = weight_of(p.mask.table, Token<C>(p.mask.routing, batch * x.shape[2] + position), head);
    if (m == C(1) && x.data == out.data) return;
    const Matrix from = head_of(x, batch, head), to = head_of(out, batch, head);
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
void delta_rows(const DeltaOperands& p) {
  for_rows(p.dz, [&](int64_t batch, int64_t head, int64_t position) {
    const Token<C> token(p.masks.routing, batch * p.dz.shape[2] + position);
    const C m_forward = weight_of(p.masks.forward_heads, token, head);
    const C m_heads = weight_of(p.masks.heads, token, head);
    const Matrix g = head_of(p.dz, batch, head), o = head_of(p.o, batch, head);
    alignas(64) C g_scratch[BLOCK], o_scratch[BLOCK], product[BLOCK];
    C total = 0;
    for (int64_t first = 0; first < g.cols; first += BLOCK) {
      const int64_t n = std::min(BLOCK, g.cols - first);
      const C* values = load(g, position, first, n, g_scratch);
      const C* o_values = load(o, position, first, n, o_scratch);
      std::copy(values, values + n, product);
      scale(m_forward, n, product);
      scale(m_heads, n, product);
      if (p.d_o.data != nullptr) store(head_of(p.d_o, batch, head), position, first, n, product);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) total += product[i] * o_values[i];
    }
    store(p.delta, batch * p.dz.shape[1] + head, position, 1, &total);
  });
}

}  // namespace

void masked_heads(const HeadOperands& p, const Stream&) { GRADROUTE_SWITCH_COMPUTE(p.x.dtype, mask_rows<C>(p)); }

void attention_delta(const DeltaOperands& p, const Stream&) { GRADROUTE_SWITCH_COMPUTE(p.dz.dtype, delta_rows<C>(p)); }

}  // namespace gradroute::GRADROUTE_CPU
