// The activation's backward with every mask of an MLP folded in, and the bias gradient on the way.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

template <class C>
void activation_rows(const ActivationOperands& p) {
  const MLPMasks& masks = p.masks;
  for_blocks(
      p.a.rows, p.a.cols, [&](int64_t run) { clear<C>(p.sums, run); },
      [&](int64_t token, int64_t first, int64_t n) {
        alignas(64) C a_scratch[BLOCK], g_scratch[BLOCK], value[BLOCK], derivative[BLOCK];
        const Token<C> t(masks.routing, token);
        activate(p.activation, n, load(p.a, token, first, n, a_scratch), value, derivative);
        if (p.z.data != nullptr) {
          apply_masks(masks.z, t, first, n, value);
          store(p.z, token, first, n, value);
        }
        if (p.dz.data == nullptr) return;
        const C* g = load(p.dz, token, first, n, g_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) derivative[i] *= g[i];
        apply_masks(masks.gradient, t, first, n, derivative);
        store(p.da, token, first, n, derivative);
        if (p.sums.data == nullptr) return;
        apply_masks(masks.update, t, first, n, derivative);
        add_to(p.sums, token / TOKENS_PER_SUM, first, n, derivative);
      });
}

}  // namespace

void activation_backward(const ActivationOperands& p, const Stream&) {
  GRADROUTE_SWITCH_COMPUTE(p.a.dtype, activation_rows<C>(p));
}

}  // namespace gradroute::GRADROUTE_CPU
