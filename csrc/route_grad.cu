// The masked product of a gradient: into a new matrix, or in place on the elements that a table changes.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int THREADS = 256;
constexpr int MAX_LANES = 64;
constexpr int TOKENS = 4;  // how many a thread handles at once: their loads do not wait for each other
constexpr int64_t MAX_RANGES = 16;

// Runs [start, stop) of vectors of features, disjoint: a vector belongs to one thread.
struct Ranges {
  int64_t start[MAX_RANGES];
  int64_t stop[MAX_RANGES];
  int64_t count;
};

template <int N>
__device__ __forceinline__ bool all_equal(const float (&m)[N], float value) {
  bool equal = true;
#pragma unroll
  for (int i = 0; i < N; ++i) equal &= m[i] == value;
  return equal;
}

// out = m ⊙ g for one vector of TOKENS tokens, `step` apart. Vectors whose weights are all 0 are not read; in place,
// those whose weights are all 1 are neither read nor written.
template <class Access>
__device__ __forceinline__ void mask_tokens(const Matrix& g, const Matrix& out, const Mask& mask, int64_t token,
                                            int step, int64_t first) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  float m[TOKENS][N];
  Vector<E, N> vectors[TOKENS] = {};
  bool changed[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    const int64_t row = token + i * step;
    weights_of(mask.table, Token(mask.routing, min(row, g.rows - 1)), first, m[i]);
    changed[i] = row < g.rows && !(g.data == out.data && all_equal(m[i], 1.0f));
  }
#pragma unroll
  for (int i = 0; i < TOKENS; ++i)
    if (changed[i] && !all_equal(m[i], 0.0f)) vectors[i] = load<E, N>(g, token + i * step, first);
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    if (!changed[i]) continue;
    float values[N];
    unpack(vectors[i], values);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = masked(m[i][j], values[j]);
    store<E, N>(out, token + i * step, first, values);
  }
}

template <class Access>
__global__ __launch_bounds__(THREADS, 3) void masked_product_kernel(Matrix g, Matrix out, Mask mask,
                                                                    const __grid_constant__ Ranges ranges) {
  const int64_t vector = ranges.start[blockIdx.z] + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (vector >= ranges.stop[blockIdx.z]) return;
  const int64_t tile = blockDim.y * TOKENS;
  for (int64_t token = blockIdx.y * tile + threadIdx.y; token < g.rows; token += gridDim.y * tile)
    mask_tokens<Access>(g, out, mask, token, blockDim.y, vector * Access::WIDTH);
}

// The vectors of n features that a masked product visits. In place, only those that touch a segment are visited.
Ranges ranges_of(const Matrix& g, const Matrix& out, const Segments& segments, int64_t n) {
  Ranges ranges = {{0}, {ceil_div(g.cols, n)}, 1};
  if (g.data != out.data || segments.count == 0 || segments.count > MAX_RANGES) return ranges;
  ranges.count = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t start = segments.bounds[2 * s] / n, stop = ceil_div(segments.bounds[2 * s + 1], n);
    if (ranges.count > 0 && start < ranges.stop[ranges.count - 1]) {
      ranges.stop[ranges.count - 1] = stop;  // the vector that both touch is visited once
    } else {
      ranges.start[ranges.count] = start;
      ranges.stop[ranges.count++] = stop;
    }
  }
  return ranges;
}

Grid grid_of(const Matrix& g, const Ranges& ranges) {
  int64_t longest = 0;
  for (int64_t i = 0; i < ranges.count; ++i) longest = std::max(longest, ranges.stop[i] - ranges.start[i]);
  const unsigned lanes = lanes_for(longest, MAX_LANES), rows = THREADS / lanes;
  return {dim3(ceil_div(longest, lanes), std::min(ceil_div(g.rows, rows * TOKENS), MAX_GRID_Y), ranges.count),
          dim3(lanes, rows)};
}

}  // namespace

namespace cuda {

void masked_product(const ProductOperands& p, const Stream& stream) {
  if (p.g.rows == 0 || p.g.cols == 0) return;
  with_access(
      "masked_product", p.g.dtype,
      [&](auto access) {
        using Access = decltype(access);
        const Ranges ranges = ranges_of(p.g, p.out, p.segments, Access::WIDTH);
        launch("masked_product_kernel", masked_product_kernel<Access>, grid_of(p.g, ranges), stream, p.g, p.out, p.mask,
               ranges);
      },
      p.g, p.out, p.mask);
}

}  // namespace cuda
}  // namespace gradroute
