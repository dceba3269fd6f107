// The hidden activations of an MLP in one pass, with the bits of eager PyTorch on the same device: act(a), or
// act(gate) * up, and the forward mask. Every operation of eager's has its own rounding here, and inside an operation
// the arithmetic is that of PyTorch's kernel: CUDA's expf, erff and tanhf, an exact division, the same fused
// multiply-adds. Read from machine code for sm_90: for silu, gelu and gelu_tanh in fp32 a thread runs the very
// floating-point instructions of PyTorch 2.11's kernels (CUDA 13.0), and relu and the cube of gelu_new are formed as
// there. The bits of a device are compared before its first use all the same (gradroute/primitives/fused_forward.py).
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int THREADS = 256;
constexpr int MAX_LANES = 64;
constexpr int TOKENS = 2;  // how many a thread handles at once: their loads do not wait for each other

// Products and sums that are rounded by themselves: the compiler fuses none of them into a multiply-add.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float sum(float a, float b) { return __fadd_rn(a, b); }

// relu, which keeps NaN.
__device__ __forceinline__ float positive_part(float a) { return a != a ? a : fmaxf(a, 0.0f); }

// sqrt(2 / pi), of which gelu_fast has ten digits, and the cubic coefficient of both forms of gelu by tanh. In fp32 the
// two slopes are one number.
constexpr float SLOPE = 0.79788456080286535588f;
constexpr float CUBIC = 0.044715f;

// 0.5 a (1 + tanh(u)), each operation rounded to E.
template <class E>
__device__ __forceinline__ float half_of_one_plus_tanh(float a, float u) {
  const float one_plus = rounded<E>(sum(1.0f, rounded<E>(tanhf(u))));
  return rounded<E>(product(rounded<E>(product(0.5f, a)), one_plus));
}

// act(a) in eager PyTorch's rounding, which of gelu_new, gelu_fast and relu2 is that of several operations.
template <ForwardActivation activation, class E>
__device__ __forceinline__ float forward_value(float a) {
  if constexpr (activation == ForwardActivation::silu) {
    return rounded<E>(a / (1.0f + expf(-a)));
  } else if constexpr (activation == ForwardActivation::gelu) {
    return rounded<E>(product(product(a, 0.5f), sum(1.0f, erff(product(a, 0.70710678118654752440f)))));
  } else if constexpr (activation == ForwardActivation::gelu_tanh) {
    const float inner = product(SLOPE, fmaf(CUBIC, product(product(a, a), a), a));
    return rounded<E>(product(product(0.5f, a), sum(1.0f, tanhf(inner))));
  } else if constexpr (activation == ForwardActivation::gelu_new) {
    const float cube = rounded<E>(product(rounded<E>(product(a, a)), a));
    const float inner = rounded<E>(sum(a, rounded<E>(product(CUBIC, cube))));
    return half_of_one_plus_tanh<E>(a, rounded<E>(product(SLOPE, inner)));
  } else if constexpr (activation == ForwardActivation::gelu_fast) {
    const float square = rounded<E>(product(rounded<E>(product(CUBIC, a)), a));
    const float factor = rounded<E>(sum(1.0f, square));
    return half_of_one_plus_tanh<E>(a, rounded<E>(product(rounded<E>(product(a, SLOPE)), factor)));
  } else if constexpr (activation == ForwardActivation::relu) {
    return positive_part(a);
  } else {
    return rounded<E>(product(positive_part(a), positive_part(a)));
  }
}

template <ForwardActivation activation, class E, int N>
__device__ __forceinline__ void forward_values(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = forward_value<activation, E>(values[i]);
}

// act of a vector. The activation is a branch that all threads take alike.
template <class E, int N>
__device__ __forceinline__ void forward_values(ForwardActivation activation, float (&values)[N]) {
  switch (activation) {
    case ForwardActivation::silu:
      return forward_values<ForwardActivation::silu, E>(values);
    case ForwardActivation::gelu:
      return forward_values<ForwardActivation::gelu, E>(values);
    case ForwardActivation::gelu_tanh:
      return forward_values<ForwardActivation::gelu_tanh, E>(values);
    case ForwardActivation::gelu_new:
      return forward_values<ForwardActivation::gelu_new, E>(values);
    case ForwardActivation::gelu_fast:
      return forward_values<ForwardActivation::gelu_fast, E>(values);
    case ForwardActivation::relu:
      return forward_values<ForwardActivation::relu, E>(values);
    case ForwardActivation::relu2:
      return forward_values<ForwardActivation::relu2, E>(values);
  }
}

// One vector of TOKENS tokens, `step` apart.
template <class Access>
__device__ __forceinline__ void forward_tokens(const ForwardOperands& p, int64_t token, int step, int64_t first) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  Vector<E, N> a[TOKENS] = {}, up[TOKENS] = {};
  Token tokens[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    const int64_t row = token + i * step;
    if (row >= p.a.rows) break;
    a[i] = load<E, N>(p.a, row, first);
    if (p.up.data != nullptr) up[i] = load<E, N>(p.up, row, first);
    if (p.mask.table.weights != nullptr) tokens[i] = Token(p.mask.routing, row);
  }
#pragma unroll
  for (int i = 0; i < TOKENS; ++i) {
    const int64_t row = token + i * step;
    if (row >= p.a.rows) break;
    float values[N], factors[N];
    unpack(a[i], values);
    forward_values<E>(p.activation, values);
    if (p.up.data != nullptr) {
      unpack(up[i], factors);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = rounded<E>(product(values[j], factors[j]));
    }
    apply_mask(p.mask.table, tokens[i], first, values);
    store<E, N>(p.z, row, first, values);
  }
}

// A block has blockDim.x threads for the features of a row, and blockDim.y rows.
template <class Access>
__global__ __launch_bounds__(THREADS, 2) void activation_forward_kernel(const __grid_constant__ ForwardOperands p) {
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * Access::WIDTH;
  if (first >= p.a.cols) return;
  const int64_t tile = blockDim.y * TOKENS;
  for (int64_t token = blockIdx.y * tile + threadIdx.y; token < p.a.rows; token += gridDim.y * tile)
    forward_tokens<Access>(p, token, blockDim.y, first);
}

}  // namespace

namespace cuda {

void activation_forward(const ForwardOperands& p, const Stream& stream) {
  if (p.a.rows == 0 || p.a.cols == 0) return;
  with_access(
      "activation_forward", p.a.dtype,
      [&](auto access) {
        using Access = decltype(access);
        const int64_t vectors = ceil_div(p.a.cols, Access::WIDTH);
        const unsigned lanes = lanes_for(vectors, MAX_LANES), rows = THREADS / lanes;
        const Grid grid = {dim3(ceil_div(vectors, lanes), std::min(ceil_div(p.a.rows, rows * TOKENS), MAX_GRID_Y)),
                           dim3(lanes, rows)};
        launch("activation_forward_kernel", activation_forward_kernel<Access>, grid, stream, p);
      },
      p.a, p.up, p.z, p.mask);
}

}  // namespace cuda
}  // namespace gradroute
