// The backward of act(gate) * up with every mask of a gated MLP folded in, and the bias gradients on the way.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int TOKENS = 2;  // how many a thread handles at once: their loads do not wait for each other

template <class Access>
struct GluVectors {
  Vector<typename Access::Element, Access::WIDTH> gate, up, dz;
  Token token;
};

template <int N>
__device__ __forceinline__ void multiply(float (&values)[N], const float (&by)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] *= by[i];
}

// One vector of one token; gate_total += m_update ⊙ dgate, up_total += m_update ⊙ dup.
template <class Access>
__device__ __forceinline__ void glu_vector(const GluOperands& p, int64_t row, int64_t first,
                                           const GluVectors<Access>& vectors, float (&gate_total)[Access::WIDTH],
                                           float (&up_total)[Access::WIDTH]) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  float to_gate[N], to_up[N], operand[N];
  unpack(vectors.gate, operand);
  values_and_derivatives(p.activation, operand, to_up, to_gate);
  unpack(vectors.up, operand);
  multiply(to_gate, operand);
  const Token& token = vectors.token;
  if (p.z.data != nullptr) {
    multiply(operand, to_up);
    apply_masks(p.masks.z, token, first, operand);
    store<E, N>(p.z, row, first, operand);
  }
  if (p.dz.data == nullptr) return;
  unpack(vectors.dz, operand);
  multiply(to_gate, operand);
  multiply(to_up, operand);
  apply_masks(p.masks.gradient, token, first, to_gate, to_up);
  store<E, N>(p.dgate, row, first, to_gate);
  store<E, N>(p.dup, row, first, to_up);
  if (p.gate_sums.data == nullptr) return;
  apply_masks(p.masks.update, token, first, to_gate, to_up);
  add_to(gate_total, to_gate);
  add_to(up_total, to_up);
}

// One vector of the tokens from `token` to `last` that belong to this thread.
template <class Access>
__device__ __forceinline__ void glu_tokens(const GluOperands& p, int64_t token, int64_t last, int64_t first,
                                           float (&gate_total)[Access::WIDTH], float (&up_total)[Access::WIDTH]) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
#pragma unroll 1
  for (; token < last; token += TOKENS * TILE_ROWS) {
    GluVectors<Access> vectors[TOKENS] = {};
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const int64_t row = token + i * TILE_ROWS;
      if (row >= last) break;
      vectors[i].gate = load<E, N>(p.gate, row, first);
      vectors[i].up = load<E, N>(p.up, row, first);
      if (p.dz.data != nullptr) vectors[i].dz = load<E, N>(p.dz, row, first);
      vectors[i].token = Token(p.masks.routing, row);
    }
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
      if (token + i * TILE_ROWS < last)
        glu_vector<Access>(p, token + i * TILE_ROWS, first, vectors[i], gate_total, up_total);
  }
}

template <class Access>
__global__ __launch_bounds__(TILE_THREADS, 2) void glu_backward_kernel(GluOperands p) {
  constexpr int N = Access::WIDTH;
  const int64_t tile = int64_t(blockIdx.x) * TILE_LANES * N, first = tile + threadIdx.x * N;
  for (int64_t run = blockIdx.y; run * TOKENS_PER_SUM < p.gate.rows; run += gridDim.y) {
    float gate_total[N] = {}, up_total[N] = {};
    const int64_t begin = run * TOKENS_PER_SUM, last = min(begin + TOKENS_PER_SUM, p.gate.rows);
    if (first < p.gate.cols) glu_tokens<Access>(p, begin + threadIdx.y, last, first, gate_total, up_total);
    if (p.gate_sums.data == nullptr) continue;
    store_sums(p.gate_sums, run, tile, gate_total);
    store_sums(p.up_sums, run, tile, up_total);
  }
}

}  // namespace

namespace cuda {

void glu_backward(const GluOperands& p, const Stream& stream) {
  if (p.gate.rows == 0 || p.gate.cols == 0) return;
  with_access(
      "glu_backward", p.gate.dtype,
      [&](auto access) {
        using Access = decltype(access);
        launch("glu_backward_kernel", glu_backward_kernel<Access>, tiles(p.gate.rows, p.gate.cols, Access::WIDTH),
               stream, p);
      },
      p.dz, p.gate, p.up, p.dgate, p.dup, p.z, p.masks);
}

}  // namespace cuda
}  // namespace gradroute
