// The weight gradient of an embedding: the masked gradients of each token's rows, summed in a fixed order.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int WARPS = 12;  // how many a block has, each with a position; all of them share a long run
constexpr int ROWS = 4;    // how many a warp handles at once: their loads do not wait for each other
static_assert(WARPS < WARP, "no two runs longer than a warp's window begin in a block");

// How many positions of a window from `start` on, one a lane, belong to the run of `token`.
__device__ __forceinline__ int window_length(const EmbeddingOperands& p, int64_t start, int64_t token) {
  const int64_t position = start + threadIdx.x;
  const bool belongs = position < p.dy.rows && __ldg(p.tokens + position) == token;
  return __popc(__ballot_sync(WHOLE_WARP, belongs));
}

// total += m ⊙ dy over `length` positions from `start` on, at one vector of features. Whole warps call it.
template <class Access>
__device__ __forceinline__ void add_window(const EmbeddingOperands& p, int64_t start, int length, int64_t first,
                                           float (&total)[Access::WIDTH]) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  const int64_t own_row = __ldg(p.order + start + (threadIdx.x < length ? threadIdx.x : 0));
  const Token own(p.update.routing, own_row);
  const bool inside = first < p.dy.cols;
#pragma unroll 1
  for (int begin = 0; begin < length; begin += ROWS) {
    Vector<E, N> vectors[ROWS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int64_t row = __shfl_sync(WHOLE_WARP, own_row, begin + i);
      if (inside && begin + i < length) vectors[i] = load<E, N>(p.dy, row, first);
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const Token token(__shfl_sync(WHOLE_WARP, own.route, begin + i), __shfl_sync(WHOLE_WARP, own.strength, begin + i),
                        own.has_strength);
      if (!inside || begin + i >= length) continue;
      float values[N];
      unpack(vectors[i], values);
      apply_mask(p.update.table, token, first, values);
      add_to(total, values);
    }
  }
}

// out[token] of a run that begins at `position`: the warps take its windows in turn and add their totals in order.
// Every thread of a block calls it.
template <class Access>
__device__ __forceinline__ void sum_long_run(const EmbeddingOperands& p, int64_t position, int64_t first) {
  constexpr int N = Access::WIDTH;
  __shared__ float totals[WARPS][WARP * N];
  const int64_t token = __ldg(p.tokens + position);
  float total[N] = {};
  int length = WARP;
#pragma unroll 1
  for (int64_t start = position + threadIdx.y * WARP; length == WARP; start += WARPS * WARP) {
    length = window_length(p, start, token);
    if (length > 0) add_window<Access>(p, start, length, first, total);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) totals[threadIdx.y][threadIdx.x * N + i] = total[i];
  __syncthreads();
  if (threadIdx.y > 0 || first >= p.dy.cols) return;
#pragma unroll 1
  for (int warp = 1; warp < WARPS; ++warp)
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += totals[warp][threadIdx.x * N + i];
  store<typename Access::Element, N>(p.out, token, first, total);
}

// Whether a run that has a row in out begins at `position`.
__device__ __forceinline__ bool begins_run(const EmbeddingOperands& p, int64_t position) {
  if (position >= p.dy.rows) return false;
  const int64_t token = __ldg(p.tokens + position);
  return token != p.padding_idx && (position == 0 || __ldg(p.tokens + position - 1) != token);
}

template <class Access>
__global__ __launch_bounds__(WARPS* WARP,
                             2) void embedding_backward_kernel(const __grid_constant__ EmbeddingOperands p) {
  constexpr int N = Access::WIDTH;
  __shared__ int64_t long_run;
  if (threadIdx.x == 0 && threadIdx.y == 0) long_run = -1;
  __syncthreads();
  const int64_t position = int64_t(blockIdx.x) * WARPS + threadIdx.y;
  const int64_t first = (int64_t(blockIdx.y) * WARP + threadIdx.x) * N;
  if (begins_run(p, position)) {
    const int64_t token = __ldg(p.tokens + position);
    const int length = window_length(p, position, token);
    if (length == WARP) {  // at most one run that begins in this block is as long
      if (threadIdx.x == 0) long_run = position;
    } else {
      float total[N] = {};
      add_window<Access>(p, position, length, first, total);
      if (first < p.dy.cols) store<typename Access::Element, N>(p.out, token, first, total);
    }
  }
  __syncthreads();
  if (long_run >= 0) sum_long_run<Access>(p, long_run, first);
}

}  // namespace

namespace cuda {

void embedding_backward(const EmbeddingOperands& p, const Stream& stream) {
  if (p.dy.rows == 0 || p.dy.cols == 0) return;
  with_access(
      "embedding_backward", p.dy.dtype,
      [&](auto access) {
        using Access = decltype(access);
        const dim3 blocks(ceil_div(p.dy.rows, WARPS), ceil_div(p.dy.cols, WARP * Access::WIDTH));
        launch("embedding_backward_kernel", embedding_backward_kernel<Access>, {blocks, dim3(WARP, WARPS)}, stream, p);
      },
      p.dy, p.out, p.update);
}

}  // namespace cuda
}  // namespace gradroute
