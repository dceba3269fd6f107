// The masked bias gradient of a linear layer. Its GEMMs are torch's.
#include "blocks.h"

namespace gradroute::GRADROUTE_CPU {

void bias_grad(Matrix g, Matrix sums, Routing routing, Table table, Stream) {
  GRADROUTE_SWITCH_COMPUTE(g.dtype, {
    for_blocks(
        g.rows, g.cols, [&](int64_t run) { clear<C>(sums, run); },
        [&](int64_t token, int64_t first, int64_t n) {
          alignas(64) C scratch[BLOCK], product[BLOCK];
          const C* values = load(g, token, first, n, scratch);
          std::copy(values, values + n, product);
          apply_mask(table, Token<C>(routing, token), first, n, product);
          add_to(sums, token / TOKENS_PER_SUM, first, n, product);
        });
  });
}

}  // namespace gradroute::GRADROUTE_CPU
