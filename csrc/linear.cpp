// The masked bias gradient of a linear layer. Its GEMMs are torch's.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {

void bias_grad(const BiasOperands& p, const Stream&) {
  GRADROUTE_SWITCH_COMPUTE(p.g.dtype, {
    for_blocks(
        p.g.rows, p.g.cols, [&](int64_t run) { clear<C>(p.sums, run); },
        [&](int64_t token, int64_t first, int64_t n) {
          alignas(64) C scratch[BLOCK], product[BLOCK];
          const C* values = load(p.g, token, first, n, scratch);
          std::copy(values, values + n, product);
          apply_mask(p.mask.table, Token<C>(p.mask.routing, token), first, n, product);
          add_to(p.sums, token / TOKENS_PER_SUM, first, n, product);
        });
  });
}

}  // namespace gradroute::GRADROUTE_CPU
