// The backward of act(gate) * up with every mask of a gated MLP folded in, and the bias gradients on the way.
#include "blocks.h"

namespace gradroute {
namespace {

template <Activation activation, class C>
void glu_rows(const Matrix& dz, const Matrix& gate, const Matrix& up, const Matrix& dgate, const Matrix& dup,
              const Matrix& z, const Matrix& gate_sums, const Matrix& up_sums, const Routing& routing, const Table& pre,
              const Table& hidden, const Table& forward, const Table& update_out, const Table& update_in) {
  for_blocks(
      gate.rows, gate.cols,
      [&](int64_t run) {
        clear<C>(gate_sums, run);
        clear<C>(up_sums, run);
      },
      [&](int64_t token, int64_t first, int64_t n) {
        alignas(64) C gate_scratch[BLOCK], up_scratch[BLOCK], g_scratch[BLOCK];
        alignas(64) C to_gate[BLOCK], to_up[BLOCK], product[BLOCK];
        const Token<C> t(routing, token);
        const C* gate_values = load(gate, token, first, n, gate_scratch);
        const C* up_values = load(up, token, first, n, up_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          value_and_derivative<activation>(gate_values[i], to_up[i], to_gate[i]);
          product[i] = to_up[i] * up_values[i];
          to_gate[i] *= up_values[i];
        }
        if (z.data != nullptr) {
          apply_mask(forward, t, first, n, product);
          apply_mask(update_out, t, first, n, product);
          store(z, token, first, n, product);
        }
        if (dz.data == nullptr) return;
        const C* g = load(dz, token, first, n, g_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          to_gate[i] *= g[i];
          to_up[i] *= g[i];
        }
        for (C* branch : {to_gate, to_up})
          for (const Table* table : {&forward, &hidden, &pre}) apply_mask(*table, t, first, n, branch);
        store(dgate, token, first, n, to_gate);
        store(dup, token, first, n, to_up);
        if (gate_sums.data == nullptr) return;
        apply_mask(update_in, t, first, n, to_gate);
        apply_mask(update_in, t, first, n, to_up);
        add_to(gate_sums, token / TOKENS_PER_SUM, first, n, to_gate);
        add_to(up_sums, token / TOKENS_PER_SUM, first, n, to_up);
      });
}

}  // namespace

namespace GRADROUTE_CPU {

void glu_backward(Matrix dz, Matrix gate, Matrix up, Matrix dgate, Matrix dup, Matrix z, Matrix gate_sums,
                  Matrix up_sums, Routing routing, Table pre, Table hidden, Table forward, Table update_out,
                  Table update_in, Activation activation, Stream) {
  GRADROUTE_SWITCH_COMPUTE(
      gate.dtype, GRADROUTE_SWITCH_ACTIVATION(
                      activation, glu_rows<ACTIVATION, C>(dz, gate, up, dgate, dup, z, gate_sums, up_sums, routing, pre,
                                                          hidden, forward, update_out, update_in)));
}

}  // namespace GRADROUTE_CPU
}  // namespace gradroute
