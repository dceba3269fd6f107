// The step of RoutedAdamW on one parameter, in one pass over it.
#include <vector>

#include "blocks.h"

namespace gradroute {
namespace {

// Columns [first, first + n) of a row, no more than a block.
struct Run {
  int64_t first, n;
};

template <class C>
struct Step {
  const Matrix &p, &g, &m, &v, &largest, &factors;
  bool by_column;
  AdamW<C> options;

  const C* factor(int64_t which, int64_t block) const {
    return reinterpret_cast<const C*>(address(factors, which, block, sizeof(C)));
  }

  // The elements [row, first .. first + n), whose factors begin at `block` and are `stride` apart: 1 or, of one block,
  // 0.
  template <int64_t stride, bool has_largest>
  void update(int64_t row, int64_t first, int64_t n, int64_t block) const {
    alignas(64) C g_scratch[BLOCK], p_new[BLOCK], m_new[BLOCK], v_new[BLOCK], largest_new[BLOCK];
    const C* gradient = load(g, row, first, n, g_scratch);
    const C* p_old = load(p, row, first, n, p_new);
    const C* m_old = load(m, row, first, n, m_new);
    const C* v_old = load(v, row, first, n, v_new);
    const C* largest_old = has_largest ? load(largest, row, first, n, largest_new) : nullptr;
    const C *decay = factor(0, block), *size = factor(1, block), *scale = factor(2, block);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      C parameter = p_old[i], average = m_old[i], square = v_old[i], most = has_largest ? largest_old[i] : C(0);
      adamw(options, BlockFactors<C>{decay[i * stride], size[i * stride], scale[i * stride]}, gradient[i], parameter,
            average, square, has_largest ? &most : nullptr);
      p_new[i] = parameter;
      m_new[i] = average;
      v_new[i] = square;
      if (has_largest) largest_new[i] = most;
    }
    store(p, row, first, n, p_new);
    store(m, row, first, n, m_new);
    store(v, row, first, n, v_new);
    if (has_largest) store(largest, row, first, n, largest_new);
  }

  template <int64_t stride>
  void update(int64_t row, int64_t first, int64_t n, int64_t block) const {
    if (largest.data == nullptr)
      update<stride, false>(row, first, n, block);
    else
      update<stride, true>(row, first, n, block);
  }

  // What a row is updated in: all of it, or the columns that are touched.
  std::vector<Run> runs(bool columns) const {
    std::vector<Run> found;
    for (int64_t first = 0; first < p.cols; ++first) {
      int64_t last = first;
      const int64_t end = std::min(first + BLOCK, p.cols);
      while (last < end && (!columns || *factor(3, last) != C(0))) ++last;
      if (last > first) found.push_back({first, last - first});
      first = std::max(first, last - 1);
    }
    return found;
  }

  void run() const {
    const bool columns = by_column && factors.cols > 1;
    const std::vector<Run> of_row = runs(columns);
    const int64_t count = of_row.size();
#pragma omp parallel for schedule(static) if (p.rows * p.cols >= PARALLEL_FROM)
    for (int64_t tile = 0; tile < p.rows * count; ++tile) {
      const int64_t row = tile / count, block = columns || factors.cols == 1 ? 0 : row;
      const Run run = of_row[tile % count];
      if (columns)
        update<1>(row, run.first, run.n, run.first);
      else if (*factor(3, block) != C(0))
        update<0>(row, run.first, run.n, block);
    }
  }
};

}  // namespace

namespace GRADROUTE_CPU {

void adamw_step(Matrix parameter, Matrix gradient, Matrix exp_avg, Matrix exp_avg_sq, Matrix max_exp_avg_sq,
                Matrix factors, bool by_column, double beta1, double beta2, double eps, bool maximize, Stream) {
  GRADROUTE_SWITCH_COMPUTE(parameter.dtype, {
    const AdamW<C> options(beta1, beta2, eps, maximize);
    Step<C>{parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, factors, by_column, options}.run();
  });
}

}  // namespace GRADROUTE_CPU
}  // namespace gradroute
