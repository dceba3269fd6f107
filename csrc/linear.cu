// The masked bias gradient of a linear layer. Its GEMMs are torch's.
#include "device.cuh"

namespace gradroute {
namespace {

constexpr int TOKENS = 4;  // of a thread at a time: their loads do not wait for each other

// total += m ⊙ g over the tokens from `token` to `last` that belong to this thread.
template <class Access>
__device__ __forceinline__ void add_tokens(const Matrix& g, const Routing& routing, const Table& table, int64_t token,
                                           int64_t last, int64_t first, float (&total)[Access::WIDTH]) {
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
      if (table.weights != nullptr) tokens[i] = Token(routing, row);
    }
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      if (token + i * TILE_ROWS >= last) break;
      float values[N];
      unpack(vectors[i], values);
      apply_mask(table, tokens[i], first, values);
      add_to(total, values);
    }
  }
}

template <class Access>
__global__ __launch_bounds__(TILE_THREADS, 2) void bias_grad_kernel(Matrix g, Matrix sums, Routing routing,
                                                                    Table table) {
  constexpr int N = Access::WIDTH;
  const int64_t tile = int64_t(blockIdx.x) * TILE_LANES * N, first = tile + threadIdx.x * N;
  for (int64_t run = blockIdx.y; run * TOKENS_PER_SUM < g.rows; run += gridDim.y) {
    float total[N] = {};
    const int64_t begin = run * TOKENS_PER_SUM, last = min(begin + TOKENS_PER_SUM, g.rows);
    if (first < g.cols) add_tokens<Access>(g, routing, table, begin + threadIdx.y, last, first, total);
    store_sums(sums, run, tile, total);
  }
}

}  // namespace

namespace cuda {

void bias_grad(Matrix g, Matrix sums, Routing routing, Table table, Stream stream) {
  if (g.rows == 0 || g.cols == 0) return;
  with_access(
      "bias_grad", g.dtype,
      [&](auto access) {
        using Access = decltype(access);
        launch("bias_grad_kernel", bias_grad_kernel<Access>, tiles(g.rows, g.cols, Access::WIDTH), stream, g, sums,
               routing, table);
      },
      g, table);
}

}  // namespace cuda
}  // namespace gradroute
