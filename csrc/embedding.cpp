// The weight gradient of an embedding: the masked gradients of each token's rows, summed in their order.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

// out[token, first .. first + n) over the run of equal tokens that begins at `position`.
template <class C>
void sum_run(const EmbeddingOperands& p, int64_t position, int64_t first, int64_t n) {
  alignas(64) C scratch[BLOCK], product[BLOCK], total[BLOCK];
  std::fill(total, total + n, C(0));
  const int64_t token = p.tokens[position];
  for (; position < p.dy.rows && p.tokens[position] == token; ++position) {
    const int64_t row = p.order[position];
    const C* values = load(p.dy, row, first, n, scratch);
    std::copy(values, values + n, product);
    apply_mask(p.update.table, Token<C>(p.update.routing, row), first, n, product);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[i] += product[i];
  }
  store(p.out, token, first, n, total);
}

template <class C>
void sum_runs(const EmbeddingOperands& p) {
  const int64_t blocks = (p.dy.cols + BLOCK - 1) / BLOCK;
  // Runs differ in length, and a frequent token's is by far the longest: threads take them as they come.
#pragma omp parallel for collapse(2) schedule(dynamic, 16) if (p.dy.rows * p.dy.cols >= PARALLEL_FROM)
  for (int64_t position = 0; position < p.dy.rows; ++position) {
    for (int64_t block = 0; block < blocks; ++block) {
      const bool begins = position == 0 || p.tokens[position - 1] != p.tokens[position];
      if (!begins || p.tokens[position] == p.padding_idx) continue;
      const int64_t first = block * BLOCK;
      sum_run<C>(p, position, first, std::min(BLOCK, p.dy.cols - first));
    }
  }
}

}  // namespace

void embedding_backward(const EmbeddingOperands& p, const Stream&) {
  GRADROUTE_SWITCH_COMPUTE(p.dy.dtype, sum_runs<C>(p));
}

}  // namespace gradroute::GRADROUTE_CPU
