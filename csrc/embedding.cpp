// The weight gradient of an embedding: the masked gradients of each token's rows, summed in their order.
#include "blocks.h"

namespace gradroute {
namespace {

// out[token, first .. first + n) over the run of equal tokens that begins at `position`.
template <class C>
void sum_run(const Matrix& dy, const Matrix& out, const int64_t* tokens, const int64_t* order, int64_t position,
             int64_t first, int64_t n, const Routing& routing, const Table& update) {
  alignas(64) C scratch[BLOCK], product[BLOCK], total[BLOCK];
  std::fill(total, total + n, C(0));
  const int64_t token = tokens[position];
  for (; position < dy.rows && tokens[position] == token; ++position) {
    const int64_t row = order[position];
    const C* values = load(dy, row, first, n, scratch);
    std::copy(values, values + n, product);
    apply_mask(update, Token<C>(routing, row), first, n, product);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[i] += product[i];
  }
  store(out, token, first, n, total);
}

template <class C>
void sum_runs(const Matrix& dy, const Matrix& out, const int64_t* tokens, const int64_t* order, int64_t padding_idx,
              const Routing& routing, const Table& update) {
  const int64_t blocks = (dy.cols + BLOCK - 1) / BLOCK;
  // Runs differ in length, a frequent token's most of all: threads take them as they come.
#pragma omp parallel for collapse(2) schedule(dynamic, 16) if (dy.rows * dy.cols >= PARALLEL_FROM)
  for (int64_t position = 0; position < dy.rows; ++position) {
    for (int64_t block = 0; block < blocks; ++block) {
      const bool begins = position == 0 || tokens[position - 1] != tokens[position];
      if (!begins || tokens[position] == padding_idx) continue;
      const int64_t first = block * BLOCK;
      sum_run<C>(dy, out, tokens, order, position, first, std::min(BLOCK, dy.cols - first), routing, update);
    }
  }
}

}  // namespace

namespace GRADROUTE_CPU {

void embedding_backward(Matrix dy, Matrix out, Indices tokens, Indices order, int64_t padding_idx, Routing routing,
                        Table update, Stream) {
  GRADROUTE_SWITCH_COMPUTE(dy.dtype, sum_runs<C>(dy, out, tokens.data, order.data, padding_idx, routing, update));
}

}  // namespace GRADROUTE_CPU
}  // namespace gradroute
