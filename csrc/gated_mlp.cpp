// The backward of act(gate) * up with every mask of a gated MLP folded in, and the bias gradients on the way.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

template <class C>
void glu_rows(const GluOperands& p) {
  const MLPMasks& masks = p.masks;
  for_blocks(
      p.gate.rows, p.gate.cols,
      [&](int64_t run) {
        clear<C>(p.gate_sums, run);
        clear<C>(p.up_sums, run);
      },
      [&](int64_t token, int64_t first, int64_t n) {
        alignas(64) C gate_scratch[BLOCK], up_scratch[BLOCK], g_scratch[BLOCK];
        alignas(64) C to_gate[BLOCK], to_up[BLOCK], product[BLOCK];
        const Token<C> t(masks.routing, token);
        activate(p.activation, n, load(p.gate, token, first, n, gate_scratch), to_up, to_gate);
        const C* up = load(p.up, token, first, n, up_scratch);
        if (p.z.data != nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) product[i] = to_up[i] * up[i];
          apply_masks(masks.z, t, first, n, product);
          store(p.z, token, first, n, product);
        }
        if (p.dz.data == nullptr) return;
        const C* g = load(p.dz, token, first, n, g_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          to_gate[i] = to_gate[i] * up[i] * g[i];
          to_up[i] *= g[i];
        }
        for (C* branch : {to_gate, to_up}) apply_masks(masks.gradient, t, first, n, branch);
        store(p.dgate, token, first, n, to_gate);
        store(p.dup, token, first, n, to_up);
        if (p.gate_sums.data == nullptr) return;
        for (C* branch : {to_gate, to_up}) apply_masks(masks.update, t, first, n, branch);
        add_to(p.gate_sums, token / TOKENS_PER_SUM, first, n, to_gate);
        add_to(p.up_sums, token / TOKENS_PER_SUM, first, n, to_up);
      });
}

}  // namespace

void glu_backward(const GluOperands& p, const Stream&) { GRADROUTE_SWITCH_COMPUTE(p.gate.dtype, glu_rows<C>(p)); }

}  // namespace gradroute::GRADROUTE_CPU
