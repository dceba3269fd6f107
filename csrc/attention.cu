// Routed attention's own kernels beside those of attention: masks by (token, head), and delta = rowsum(do ⊙ o).
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int THREADS = 256;
constexpr int POSITIONS = 4;  // how many a thread handles at once: their loads do not wait for each other

// The weight of a head; 1 without a table.
__device__ __forceinline__ float weight_of(const Table& table, const Token& token, int64_t head) {
  return table.weights == nullptr ? 1.0f : token.weight(table, head);
}

template <int N>
__device__ __forceinline__ void scale(float m, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = masked(m, values[i]);
}

// out = m ⊙ x for POSITIONS rows of a head, `step` apart. Rows with m = 0 are not read.
template <class Access>
__device__ __forceinline__ void mask_rows(const Matrix& x, const Matrix& out, const float (&m)[POSITIONS],
                                          const bool (&changed)[POSITIONS], int64_t position, int step) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
#pragma unroll 1
  for (int64_t first = threadIdx.x * N; first < x.cols; first += blockDim.x * N) {
    Vector<E, N> vectors[POSITIONS] = {};
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i)
      if (changed[i] && m[i] != 0.0f) vectors[i] = load<E, N>(x, position + i * step, first);
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) {
      if (!changed[i]) continue;
      float values[N];
      unpack(vectors[i], values);
      scale(m[i], values);
      store<E, N>(out, position + i * step, first, values);
    }
  }
}

// A block has blockDim.x threads for the features of a row, and blockDim.y rows; the grid has positions, heads,
// batches.
template <class Access>
__global__ __launch_bounds__(THREADS) void masked_heads_kernel(const __grid_constant__ HeadOperands p) {
  using E = typename Access::Element;
  const Heads &x = p.x, &out = p.out;
  const int64_t sequence = x.shape[2], head = blockIdx.y;
  const int64_t position = int64_t(blockIdx.x) * blockDim.y * POSITIONS + threadIdx.y;
  for (int64_t batch = blockIdx.z; batch < x.shape[0]; batch += gridDim.z) {
    float m[POSITIONS];
    bool changed[POSITIONS];
#pragma unroll
    for (int i = 0; i < POSITIONS; ++i) {
      const int64_t row = position + i * blockDim.y;
      const Token token(p.mask.routing, batch * sequence + min(row, sequence - 1));
      m[i] = weight_of(p.mask.table, token, head);
      changed[i] = row < sequence && !(x.data == out.data && m[i] == 1.0f);
    }
    mask_rows<Access>(head_of<E>(x, batch, head), head_of<E>(out, batch, head), m, changed, position, blockDim.y);
  }
}

// Σ d_o ⊙ o over a thread's vectors of a row; d_o is stored where it is wanted.
template <class Access>
__device__ __forceinline__ float delta_of(const DeltaOperands& p, int64_t batch, int64_t head, int64_t position) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  const Token token(p.masks.routing, batch * p.dz.shape[2] + position);
  const float m_forward = weight_of(p.masks.forward_heads, token, head);
  const float m_heads = weight_of(p.masks.heads, token, head);
  float total = 0.0f;
#pragma unroll 2
  for (int64_t first = threadIdx.x * N; first < p.dz.shape[3]; first += blockDim.x * N) {
    float g[N], o[N];
    unpack(load<E, N>(head_of<E>(p.dz, batch, head), position, first), g);
    unpack(load<E, N>(head_of<E>(p.o, batch, head), position, first), o);
    scale(m_forward, g);
    scale(m_heads, g);
    if (p.d_o.data != nullptr) store<E, N>(head_of<E>(p.d_o, batch, head), position, first, g);
#pragma unroll
    for (int i = 0; i < N; ++i) total += g[i] * o[i];
  }
  return total;
}

// A block has blockDim.x threads of one warp for a row, and blockDim.y rows; the grid has positions, heads, batches.
template <class Access>
__global__ __launch_bounds__(THREADS) void attention_delta_kernel(const __grid_constant__ DeltaOperands p) {
  const int64_t head = blockIdx.y, position = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool present = position < p.dz.shape[2];
  for (int64_t batch = blockIdx.z; batch < p.dz.shape[0]; batch += gridDim.z) {
    float total = present ? delta_of<Access>(p, batch, head, position) : 0.0f;
    for (int distance = blockDim.x / 2; distance > 0; distance /= 2)
      total += __shfl_xor_sync(WHOLE_WARP, total, distance);
    if (present && threadIdx.x == 0) *address<float, 1>(p.delta, batch * p.dz.shape[1] + head, position) = total;
  }
}

// A block has rows of one head; each row has as many threads, of one warp, as it has vectors of n features.
Grid grid_of(const Heads& x, int64_t n, int64_t positions) {
  const unsigned lanes = lanes_for(ceil_div(x.shape[3], n), WARP), rows = THREADS / lanes;
  return {dim3(ceil_div(x.shape[2], rows * positions), x.shape[1], std::min(x.shape[0], MAX_GRID_Y)),
          dim3(lanes, rows)};
}

bool is_empty(const Heads& x) { return x.shape[0] == 0 || x.shape[1] == 0 || x.shape[2] == 0 || x.shape[3] == 0; }

}  // namespace

namespace cuda {

void masked_heads(const HeadOperands& p, const Stream& stream) {
  if (is_empty(p.x)) return;
  with_access(
      "masked_heads", p.x.dtype,
      [&](auto access) {
        using Access = decltype(access);
        launch("masked_heads_kernel", masked_heads_kernel<Access>, grid_of(p.x, Access::WIDTH, POSITIONS), stream, p);
      },
      p.x, p.out);
}

void attention_delta(const DeltaOperands& p, const Stream& stream) {
  if (is_empty(p.dz)) return;
  with_access(
      "attention_delta", p.dz.dtype,
      [&](auto access) {
        using Access = decltype(access);
        launch("attention_delta_kernel", attention_delta_kernel<Access>, grid_of(p.dz, Access::WIDTH, 1), stream, p);
      },
      p.dz, p.o, p.d_o);
}

}  // namespace cuda
}  // namespace gradroute
