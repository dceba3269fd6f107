// The masked bias gradient of a linear layer. Its GEMMs are torch's.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int TOKENS = 4;  // how many a thread handles at once: their loads do not wait for each other

// total += m ⊙ g over the tokens from `token` to `last` that belong to this thread.
template <class Access>
__device__ __forceinline__ void add_tokens(const Matrix& g, const Mask& mask, int64_t token, int64_t last,
                                           int64_t first, float (&total)[Access::WIDTH]) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
#pragma unroll 1
  for (; token < last; token += TOKENS * TILE_ROWS) {
    Vector<E, N> vectors[TOKENS] = {};
    Token tokens[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const int64_t row = token + i * TILE_ROWS;
      if (row >= last) break;
      vectors[i] = load<E, N>(g, row, first);
      if (mask.table.weights != nullptr) tokens[i] = Token(mask.routing, row);
    }
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      if (token + i * TILE_ROWS >= last) break;
      float values[N];
      unpack(vectors[i], values);
      apply_mask(mask.table, tokens[i], first, values);
      add_to(total, values);
    }
  }
}

template <class Access>
__global__ __launch_bounds__(TILE_THREADS, 2) void bias_grad_kernel(BiasOperands p) {
  constexpr int N = Access::WIDTH;
  const int64_t tile = int64_t(blockIdx.x) * TILE_LANES * N, first = tile + threadIdx.x * N;
  for (int64_t run = blockIdx.y; run * TOKENS_PER_SUM < p.g.rows; run += gridDim.y) {
    float total[N] = {};
    const int64_t begin = run * TOKENS_PER_SUM, last = min(begin + TOKENS_PER_SUM, p.g.rows);
    if (first < p.g.cols) add_tokens<Access>(p.g, p.mask, begin + threadIdx.y, last, first, total);
    store_sums(p.sums, run, tile, total);
  }
}

}  // namespace

namespace cuda {

void bias_grad(const BiasOperands& p, const Stream& stream) {
  if (p.g.rows == 0 || p.g.cols == 0) return;
  with_access(
      "bias_grad", p.g.dtype,
      [&](auto access) {
        using Access = decltype(access);
        launch("bias_grad_kernel", bias_grad_kernel<Access>, tiles(p.g.rows, p.g.cols, Access::WIDTH), stream, p);
      },
      p.g, p.mask);
}

}  // namespace cuda
}  // namespace gradroute
