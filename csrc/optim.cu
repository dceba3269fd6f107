// The step of RoutedAdamW on one parameter, in one pass over it.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int THREADS = 256;

struct Step {
  Matrix p, g, m, v, largest, factors;
  bool by_column;
  AdamW<float> options;
};

__device__ __forceinline__ float factor(const Matrix& factors, int64_t which, int64_t block) {
  return __ldg(address<float, 1>(factors, which, block));
}

__device__ __forceinline__ BlockFactors<float> factors_of(const Matrix& factors, int64_t block) {
  return {factor(factors, 0, block), factor(factors, 1, block), factor(factors, 2, block)};
}

// Stores the values of elements that are touched; the other elements are written as they were read.
template <class E, int N>
__device__ __forceinline__ void store_touched(const Matrix& to, int64_t row, int64_t first, const Vector<E, N>& old,
                                              const float (&values)[N], const bool (&touched)[N]) {
  Vector<E, N> vector = pack<E>(values);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (!touched[i]) vector.at[i] = old.at[i];
  *reinterpret_cast<Vector<E, N>*>(address<E, N>(to, row, first)) = vector;
}

// The elements [row, first .. first + N). Vectors without a touched element are neither read nor written.
template <class Access>
__device__ __forceinline__ void update(const Step& a, int64_t row, int64_t first) {
  using E = typename Access::Element;
  constexpr int N = Access::WIDTH;
  const bool has_largest = a.largest.data != nullptr, by_column = a.by_column && a.factors.cols > 1;
  const int64_t block = a.factors.cols == 1 ? 0 : by_column ? first : row;
  bool touched[N], any = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    touched[i] = factor(a.factors, 3, by_column ? block + i : block) != 0.0f;
    any |= touched[i];
  }
  if (!any) return;
  const Vector<E, N> p_old = load<E, N>(a.p, row, first), m_old = load<E, N>(a.m, row, first),
                     v_old = load<E, N>(a.v, row, first), g_read = load<E, N>(a.g, row, first),
                     largest_old = has_largest ? load<E, N>(a.largest, row, first) : Vector<E, N>{};
  float p[N], g[N], m[N], v[N], largest[N];
  unpack(p_old, p);
  unpack(g_read, g);
  unpack(m_old, m);
  unpack(v_old, v);
  unpack(largest_old, largest);
#pragma unroll
  for (int i = 0; i < N; ++i)
    adamw(a.options, factors_of(a.factors, by_column ? block + i : block), g[i], p[i], m[i], v[i],
          has_largest ? &largest[i] : nullptr);
  store_touched(a.p, row, first, p_old, p, touched);
  store_touched(a.m, row, first, m_old, m, touched);
  store_touched(a.v, row, first, v_old, v, touched);
  if (has_largest) store_touched(a.largest, row, first, largest_old, largest, touched);
}

template <class Access>
__global__ __launch_bounds__(THREADS) void adamw_step_kernel(const __grid_constant__ Step a) {
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * Access::WIDTH;
  if (first >= a.p.cols) return;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < a.p.rows;
       row += int64_t(gridDim.y) * blockDim.y)
    update<Access>(a, row, first);
}

}  // namespace

namespace cuda {

void adamw_step(const AdamWOperands& p, const Stream& stream) {
  const int64_t rows = p.parameter.rows, cols = p.parameter.cols;
  if (rows == 0 || cols == 0) return;
  const AdamW<float> options(p.beta1, p.beta2, p.eps, p.maximize);
  const Step step{p.parameter, p.gradient, p.exp_avg, p.exp_avg_sq, p.max_exp_avg_sq, p.factors, p.by_column, options};
  with_access(
      "adamw_step", p.parameter.dtype,
      [&](auto access) {
        using Access = decltype(access);
        const int64_t vectors = ceil_div(cols, Access::WIDTH);
        const unsigned lanes = lanes_for(vectors, THREADS), lines = THREADS / lanes;
        const Grid grid = {dim3(ceil_div(vectors, lanes), std::min(ceil_div(rows, lines), MAX_GRID_Y)),
                           dim3(lanes, lines)};
        launch("adamw_step_kernel", adamw_step_kernel<Access>, grid, stream, step);
      },
      p.parameter, p.gradient, p.exp_avg, p.exp_avg_sq, p.max_exp_avg_sq);
}

}  // namespace cuda
}  // namespace gradroute
