// The activation's backward with every mask of an MLP folded in, and the bias gradient on the way.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int TOKENS = 2;  // how many a thread handles at once: their loads do not wait for each other

// One vector of one token; total += m_update ⊙ da.
template <class Access>
__device__ __forceinline__ void activation_vector(const ActivationOperands& p, const Token& token, int64_t row,
                                                  int64_t first,
                                                  const Vector<typename Access::Element, Access::WIDTH>& a,
                                                  const Vector<typename Access::Element, Access::WIDTH>& dz,
                                                  float (&total)[Access::WIDTH]) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  float value[N], derivative[N], g[N];
  unpack(a, g);
  values_and_derivatives(p.activation, g, value, derivative);
  if (p.z.data != nullptr) {
    apply_masks(p.masks.z, token, first, value);
    store<E, N>(p.z, row, first, value);
  }
  if (p.dz.data == nullptr) return;
  unpack(dz, g);
#pragma unroll
  for (int i = 0; i < N; ++i) derivative[i] *= g[i];
  apply_masks(p.masks.gradient, token, first, derivative);
  store<E, N>(p.da, row, first, derivative);
  if (p.sums.data == nullptr) return;
  apply_masks(p.masks.update, token, first, derivative);
  add_to(total, derivative);
}

// One vector of the tokens from `token` to `last` that belong to this thread.
template <class Access>
__device__ __forceinline__ void activation_tokens(const ActivationOperands& p, int64_t token, int64_t last,
                                                  int64_t first, float (&total)[Access::WIDTH]) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
#pragma unroll 1
  for (; token < last; token += TOKENS * TILE_ROWS) {
    Vector<E, N> a[TOKENS] = {}, dz[TOKENS] = {};
    Token tokens[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const int64_t row = token + i * TILE_ROWS;
      if (row < last) a[i] = load<E, N>(p.a, row, first);
      if (row < last && p.dz.data != nullptr) dz[i] = load<E, N>(p.dz, row, first);
      tokens[i] = Token(p.masks.routing, min(row, last - 1));
    }
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const int64_t row = token + i * TILE_ROWS;
      if (row < last) activation_vector<Access>(p, tokens[i], row, first, a[i], dz[i], total);
    }
  }
}

template <class Access>
__global__ __launch_bounds__(TILE_THREADS, 3) void activation_backward_kernel(ActivationOperands p) {
  constexpr int N = Access::WIDTH;
  const int64_t tile = int64_t(blockIdx.x) * TILE_LANES * N, first = tile + threadIdx.x * N;
  for (int64_t run = blockIdx.y; run * TOKENS_PER_SUM < p.a.rows; run += gridDim.y) {
    float total[N] = {};
    const int64_t begin = run * TOKENS_PER_SUM, last = min(begin + TOKENS_PER_SUM, p.a.rows);
    if (first < p.a.cols) activation_tokens<Access>(p, begin + threadIdx.y, last, first, total);
    if (p.sums.data != nullptr) store_sums(p.sums, run, tile, total);
  }
}

}  // namespace

namespace cuda {

void activation_backward(const ActivationOperands& p, const Stream& stream) {
  if (p.a.rows == 0 || p.a.cols == 0) return;
  with_access(
      "activation_backward", p.a.dtype,
      [&](auto access) {
        using Access = decltype(access);
        launch("activation_backward_kernel", activation_backward_kernel<Access>,
               tiles(p.a.rows, p.a.cols, Access::WIDTH), stream, p);
      },
      p.dz, p.a, p.da, p.z, p.masks);
}

}  // namespace cuda
}  // namespace gradroute
