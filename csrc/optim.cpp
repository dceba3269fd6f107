// The step of RoutedAdamW on one parameter, in one pass over it.
#include <vector>

#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

// The columns [first, first + n) of a row, at most a block of them.
struct Run {
  int64_t first, n;
  bool partly;  // not all of the columns are touched
};

// A copy of a row's elements, to put back those that are not touched: rounding NaN to halves and back would not keep
// all its bits.
class Kept {
 public:
  void keep(const Matrix& m, int64_t row, const Run& run) {
    switch_size(m.dtype, [&](auto element) {
      using E = decltype(element);
      const E* from = reinterpret_cast<const E*>(address(m, row, run.first, sizeof(E)));
      for (int64_t i = 0; i < run.n; ++i) kept<E>()[i] = from[i * m.col_stride];
    });
  }

  template <class C>
  void put_back(const Matrix& m, int64_t row, const Run& run, const C* touched) {
    switch_size(m.dtype, [&](auto element) {
      using E = decltype(element);
      E* to = reinterpret_cast<E*>(address(m, row, run.first, sizeof(E)));
      for (int64_t i = 0; i < run.n; ++i)
        to[i * m.col_stride] = touched[i] != C(0) ? to[i * m.col_stride] : kept<E>()[i];
    });
  }

 private:
  template <class Body>
  static void switch_size(Dtype dtype, const Body& body) {
    if (dtype == Dtype::float64) return body(uint64_t());
    if (dtype == Dtype::float32) return body(uint32_t());
    body(uint16_t());
  }

  template <class E>
  E* kept() {
    return reinterpret_cast<E*>(bytes);
  }

  alignas(64) char bytes[BLOCK * sizeof(double)];
};

template <class C>
struct Step {
  const AdamWOperands& operands;
  const Matrix &p = operands.parameter, &g = operands.gradient, &m = operands.exp_avg, &v = operands.exp_avg_sq;
  const Matrix &largest = operands.max_exp_avg_sq, &factors = operands.factors;
  const AdamW<C> options{operands.beta1, operands.beta2, operands.eps, operands.maximize};

  const C* factor(int64_t which, int64_t block) const {
    return reinterpret_cast<const C*>(address(factors, which, block, sizeof(C)));
  }

  // The elements [row, first .. first + n), whose factors begin at `block` and are `stride` apart: 1, or 0 where all of
  // them belong to one block.
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

  // It has one instance, however often it is called: inlined, it doubled the time that this file takes to compile.
  template <int64_t stride>
  __attribute__((noinline)) void update(int64_t row, int64_t first, int64_t n, int64_t block) const {
    if (largest.data == nullptr)
      update<stride, false>(row, first, n, block);
    else
      update<stride, true>(row, first, n, block);
  }

  // The blocks of columns in which a row is updated.
  std::vector<Run> runs(bool columns) const {
    std::vector<Run> found;
    for (int64_t first = 0; first < p.cols; first += BLOCK) {
      const int64_t n = std::min(BLOCK, p.cols - first);
      const int64_t touched = columns ? std::count(factor(3, first), factor(3, first) + n, C(1)) : n;
      if (touched > 0) found.push_back({first, n, touched < n});
    }
    return found;
  }

  void update_partly(int64_t row, const Run& run) const {
    const Matrix* const changed[] = {&p, &m, &v, &largest};
    const int64_t count = largest.data == nullptr ? 3 : 4;
    Kept kept[4];
    for (int64_t i = 0; i < count; ++i) kept[i].keep(*changed[i], row, run);
    update<1>(row, run.first, run.n, run.first);
    for (int64_t i = 0; i < count; ++i) kept[i].put_back(*changed[i], row, run, factor(3, run.first));
  }

  void run() const {
    const bool columns = operands.by_column && factors.cols > 1;
    const std::vector<Run> of_row = runs(columns);
    const int64_t count = of_row.size();
#pragma omp parallel for schedule(static) if (p.rows * p.cols >= PARALLEL_FROM)
    for (int64_t tile = 0; tile < p.rows * count; ++tile) {
      const int64_t row = tile / count, block = columns || factors.cols == 1 ? 0 : row;
      const Run& run = of_row[tile % count];
      if (run.partly)
        update_partly(row, run);
      else if (columns)
        update<1>(row, run.first, run.n, run.first);
      else if (*factor(3, block) != C(0))
        update<0>(row, run.first, run.n, block);
    }
  }
};

}  // namespace

void adamw_step(const AdamWOperands& p, const Stream&) {
  GRADROUTE_SWITCH_COMPUTE(p.parameter.dtype, Step<C>{p}.run());
}

}  // namespace gradroute::GRADROUTE_CPU
