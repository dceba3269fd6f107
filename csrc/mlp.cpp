// The activation's backward with every mask of an MLP folded in, and the bias gradient on the way.
#include "blocks.h"

namespace gradroute {
namespace {

template <Activation activation, class C>
void activation_rows(const Matrix& dz, const Matrix& a, const Matrix& da, const Matrix& z, const Matrix& sums,
                     const Routing& routing, const Table& pre, const Table& hidden, const Table& forward,
                     const Table& update_out, const Table& update_in) {
  for_blocks(
      a.rows, a.cols, [&](int64_t run) { clear<C>(sums, run); },
      [&](int64_t token, int64_t first, int64_t n) {
        alignas(64) C a_scratch[BLOCK], g_scratch[BLOCK], value[BLOCK], derivative[BLOCK];
        const Token<C> t(routing, token);
        const C* a_values = load(a, token, first, n, a_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) value_and_derivative<activation>(a_values[i], value[i], derivative[i]);
        if (z.data != nullptr) {
          apply_mask(forward, t, first, n, value);
          apply_mask(update_out, t, first, n, value);
          store(z, token, first, n, value);
        }
        if (dz.data == nullptr) return;
        const C* g = load(dz, token, first, n, g_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) derivative[i] *= g[i];
        for (const Table* table : {&forward, &hidden, &pre}) apply_mask(*table, t, first, n, derivative);
        store(da, token, first, n, derivative);
        if (sums.data == nullptr) return;
        apply_mask(update_in, t, first, n, derivative);
        add_to(sums, token / TOKENS_PER_SUM, first, n, derivative);
      });
}

}  // namespace

namespace GRADROUTE_CPU {

void activation_backward(Matrix dz, Matrix a, Matrix da, Matrix z, Matrix sums, Routing routing, Table pre,
                         Table hidden, Table forward, Table update_out, Table update_in, Activation activation,
                         Stream) {
  GRADROUTE_SWITCH_COMPUTE(
      a.dtype,
      GRADROUTE_SWITCH_ACTIVATION(activation, activation_rows<ACTIVATION, C>(dz, a, da, z, sums, routing, pre, hidden,
                                                                             forward, update_out, update_in)));
}

}  // namespace GRADROUTE_CPU
}  // namespace gradroute
