// The backward of RMS norm and layer norm, the update mask folded in: dx and the sums of dW and db in one pass over
// rows that stay in the cache.
#include "cpu.h"

namespace gradroute::GRADROUTE_CPU {
namespace {

template <class C>
struct Norm {
  const NormOperands& p;
  const Matrix& x = p.x;
  const C eps = C(p.eps), offset = C(p.offset);

  // Calls body(first, n) for the blocks of a row.
  template <class Body>
  void blocks(const Body& body) const {
    for (int64_t first = 0; first < x.cols; first += BLOCK) body(first, std::min(BLOCK, x.cols - first));
  }

  C mean(int64_t token) const {
    if (!p.centered) return C(0);
    alignas(64) C scratch[BLOCK];
    C total = 0;
    blocks([&](int64_t first, int64_t n) {
      const C* values = load(x, token, first, n, scratch);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < n; ++i) total += values[i];
    });
    return total / C(x.cols);
  }

  C reciprocal_root_mean_square(int64_t token, C mean) const {
    alignas(64) C scratch[BLOCK];
    C squares = 0;
    blocks([&](int64_t first, int64_t n) {
      const C* values = load(x, token, first, n, scratch);
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < n; ++i) squares += (values[i] - mean) * (values[i] - mean);
    });
    return C(1) / std::sqrt(squares / C(x.cols) + eps);
  }

  // dx̂ = dy ⊙ (weight + offset) and x̂ of a block.
  void gradient_block(int64_t token, int64_t first, int64_t n, C mean, C rstd, C* dx_hat, C* x_hat) const {
    alignas(64) C dy_scratch[BLOCK], x_scratch[BLOCK], weight_scratch[BLOCK];
    const C* g = load(p.dy, token, first, n, dy_scratch);
    const C* values = load(x, token, first, n, x_scratch);
    const C* w = load(p.weight, 0, first, n, weight_scratch);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      dx_hat[i] = g[i] * (w[i] + offset);
      x_hat[i] = (values[i] - mean) * rstd;
    }
  }

  void input_grad(int64_t token, C mean, C rstd) const {
    alignas(64) C dx_hat[BLOCK], x_hat[BLOCK];
    C total = 0, projection = 0;
    blocks([&](int64_t first, int64_t n) {
      gradient_block(token, first, n, mean, rstd, dx_hat, x_hat);
#pragma omp simd reduction(+ : total, projection)
      for (int64_t i = 0; i < n; ++i) {
        total += dx_hat[i];
        projection += dx_hat[i] * x_hat[i];
      }
    });
    total = p.centered ? total / C(x.cols) : C(0);
    projection /= C(x.cols);
    blocks([&](int64_t first, int64_t n) {
      gradient_block(token, first, n, mean, rstd, dx_hat, x_hat);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) dx_hat[i] = rstd * (dx_hat[i] - total - x_hat[i] * projection);
      store(p.dx, token, first, n, dx_hat);
    });
  }

  void parameter_grads(int64_t token, C mean, C rstd) const {
    alignas(64) C dy_scratch[BLOCK], x_scratch[BLOCK], product[BLOCK];
    const Token<C> t(p.update.routing, token);
    blocks([&](int64_t first, int64_t n) {
      const C* g = load(p.dy, token, first, n, dy_scratch);
      if (p.weight_sums.data != nullptr) {
        const C* values = load(x, token, first, n, x_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) product[i] = (values[i] - mean) * rstd;
        if (p.round_x_hat) round_to(x.dtype, n, product);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) product[i] *= g[i];
        apply_mask(p.update.table, t, first, n, product);
        add_to(p.weight_sums, token / TOKENS_PER_SUM, first, n, product);
      }
      if (p.bias_sums.data != nullptr) {
        std::copy(g, g + n, product);
        apply_mask(p.update.table, t, first, n, product);
        add_to(p.bias_sums, token / TOKENS_PER_SUM, first, n, product);
      }
    });
  }

  void run() const {
    const int64_t runs = (x.rows + TOKENS_PER_SUM - 1) / TOKENS_PER_SUM;
#pragma omp parallel for schedule(static) if (x.rows * x.cols >= PARALLEL_FROM)
    for (int64_t run = 0; run < runs; ++run) {
      clear<C>(p.weight_sums, run);
      clear<C>(p.bias_sums, run);
      const int64_t last = std::min(x.rows, (run + 1) * TOKENS_PER_SUM);
      for (int64_t token = run * TOKENS_PER_SUM; token < last; ++token) {
        const C mean_ = mean(token);
        const C rstd = reciprocal_root_mean_square(token, mean_);
        if (p.dx.data != nullptr) input_grad(token, mean_, rstd);
        parameter_grads(token, mean_, rstd);
      }
    }
  }
};

}  // namespace

void norm_backward(const NormOperands& p, const Stream&) { GRADROUTE_SWITCH_COMPUTE(p.x.dtype, Norm<C>{p}.run()); }

}  // namespace gradroute::GRADROUTE_CPU
