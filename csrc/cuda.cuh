// The parts that all CUDA kernels share: vectors of elements, the masks of a vector, sums over a run of tokens,
// launching. A kernel is written once for a width of access: 16 bytes where memory allows, else element by element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "math.h"
#include "ops.h"

namespace gradroute {
namespace {

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xFFFFFFFFu;

// A tile of the kernels that sum over tokens: TILE_LANES vectors of features by a run of tokens. Each row of threads
// has every TILE_ROWS-th token of the run.
constexpr int TILE_LANES = WARP;
constexpr int TILE_ROWS = 8;
constexpr int TILE_THREADS = TILE_LANES * TILE_ROWS;
static_assert(TOKENS_PER_SUM % TILE_ROWS == 0, "rows of threads have equally many tokens");

// CUDA's limit on the second and third dimensions of a grid; kernels loop over what is beyond.
constexpr int64_t MAX_GRID_Y = 65535;

constexpr int BYTES_PER_ACCESS = 16;

// How a kernel reads and writes: N neighbouring features of type E at once.
template <class E, int N>
struct Access {
  using Element = E;
  static constexpr int WIDTH = N;
};

template <class E, int N>
struct alignas(sizeof(E) * N < BYTES_PER_ACCESS ? sizeof(E) * N : BYTES_PER_ACCESS) Vector {
  E at[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void round_to(float x, float& to) { to = x; }
__device__ __forceinline__ void round_to(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(float x, __half& to) { to = __float2half_rn(x); }

// x rounded to E.
template <class E>
__device__ __forceinline__ float rounded(float x) {
  E element;
  round_to(x, element);
  return to_float(element);
}

template <class E, int N>
__device__ __forceinline__ void unpack(const Vector<E, N>& vector, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(vector.at[i]);
}

// Pair by pair: taken one by one, 8 elements that are being loaded would hold 8 registers instead of 4.
template <int N, class = std::enable_if_t<N % 2 == 0>>
__device__ __forceinline__ void unpack(const Vector<__nv_bfloat16, N>& vector, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    uint32_t pair;
    memcpy(&pair, vector.at + i, sizeof(pair));
    values[i] = bits_as<float>(pair << 16);
    values[i + 1] = bits_as<float>(pair & 0xFFFF0000u);
  }
}

template <class E, int N>
__device__ __forceinline__ Vector<E, N> pack(const float (&values)[N]) {
  Vector<E, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(values[i], vector.at[i]);
  return vector;
}

// The address of [row, first]. Vectors are only formed where features are contiguous.
template <class E, int N>
__device__ __forceinline__ E* address(const Matrix& m, int64_t row, int64_t first) {
  return static_cast<E*>(m.data) + row * m.row_stride + (N == 1 ? first * m.col_stride : first);
}

// The elements [row, first .. first + N).
template <class E, int N>
__device__ __forceinline__ Vector<E, N> load(const Matrix& m, int64_t row, int64_t first) {
  return *reinterpret_cast<const Vector<E, N>*>(address<E, N>(m, row, first));
}

// Stores a vector at [row, first .. first + N). By the intrinsic: where a vector is assigned, the compiler sees its
// elements, and for sm_80 and sm_90 made four stores of 4 bytes of them.
template <class E, int N>
__device__ __forceinline__ void store(const Matrix& m, int64_t row, int64_t first, const Vector<E, N>& vector) {
  E* to = address<E, N>(m, row, first);
  if constexpr (sizeof(vector) % BYTES_PER_ACCESS == 0) {
#pragma unroll
    for (int i = 0; i < int(sizeof(vector) / BYTES_PER_ACCESS); ++i) {
      uint4 bytes;
      memcpy(&bytes, vector.at + i * (BYTES_PER_ACCESS / sizeof(E)), sizeof(bytes));
      __stwb(reinterpret_cast<uint4*>(to) + i, bytes);
    }
  } else if constexpr (sizeof(vector) == sizeof(unsigned long long)) {
    unsigned long long bytes;
    memcpy(&bytes, vector.at, sizeof(bytes));
    __stwb(reinterpret_cast<unsigned long long*>(to), bytes);
  } else {
    *reinterpret_cast<Vector<E, N>*>(to) = vector;
  }
}

// Stores values at [row, first .. first + N), each rounded once.
template <class E, int N>
__device__ __forceinline__ void store(const Matrix& m, int64_t row, int64_t first, const float (&values)[N]) {
  store<E, N>(m, row, first, pack<E>(values));
}

// The rows (batch, head) of x as a matrix [sequence, features].
template <class E>
__device__ __forceinline__ Matrix head_of(const Heads& x, int64_t batch, int64_t head) {
  Matrix m;
  m.data = static_cast<E*>(x.data) + batch * x.strides[0] + head * x.strides[1];
  m.rows = x.shape[2];
  m.cols = x.shape[3];
  m.row_stride = x.strides[2];
  m.col_stride = x.strides[3];
  m.dtype = x.dtype;
  return m;
}

// A token's route and strength.
struct Token {
  int32_t route = 0;
  float strength = 1.0f;
  bool has_strength = false;

  Token() = default;

  __device__ __forceinline__ Token(int32_t route, float strength, bool has_strength)
      : route(route), strength(strength), has_strength(has_strength) {}

  __device__ __forceinline__ Token(const Routing& routing, int64_t token)
      : route(__ldg(routing.ids + token)), has_strength(routing.strength != nullptr) {
    if (!has_strength) return;
    const int64_t at = token * routing.strength_stride;
    strength = routing.strength_is_double ? float(__ldg(static_cast<const double*>(routing.strength) + at))
                                          : __ldg(static_cast<const float*>(routing.strength) + at);
  }

  // m at one feature.
  __device__ __forceinline__ float weight(const Table& table, int64_t feature) const {
    const int64_t column = table.cols == 1 ? 0 : feature;
    const float own = __ldg(table.weights + int64_t(route) * table.cols + column);
    return has_strength ? interpolated(__ldg(table.weights + column), own, strength) : own;
  }
};

template <int N>
__device__ __forceinline__ void load_weights(const float* from, float (&weights)[N]) {
  if constexpr (N == 1) {
    weights[0] = __ldg(from);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
      weights[i] = four.x;
      weights[i + 1] = four.y;
      weights[i + 2] = four.z;
      weights[i + 3] = four.w;
    }
  }
}

// m at the features [first, first + N).
template <int N>
__device__ __forceinline__ void weights_of(const Table& table, const Token& token, int64_t first, float (&m)[N]) {
  if (table.cols == 1) {
    const float weight = token.weight(table, 0);
#pragma unroll
    for (int i = 0; i < N; ++i) m[i] = weight;
    return;
  }
  load_weights(table.weights + int64_t(token.route) * table.cols + first, m);
  if (!token.has_strength) return;
  float base[N];
  load_weights(table.weights + first, base);
#pragma unroll
  for (int i = 0; i < N; ++i) m[i] = interpolated(base[i], m[i], token.strength);
}

// values = m ⊙ values for the features [first, first + N); nothing without a table.
template <int N>
__device__ __forceinline__ void apply_mask(const Table& table, const Token& token, int64_t first, float (&values)[N]) {
  if (table.weights == nullptr) return;
  float m[N];
  weights_of(table, token, first, m);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = masked(m[i], values[i]);
}

// Applies one mask to two gradients.
template <int N>
__device__ __forceinline__ void apply_mask(const Table& table, const Token& token, int64_t first, float (&one)[N],
                                           float (&other)[N]) {
  if (table.weights == nullptr) return;
  float m[N];
  weights_of(table, token, first, m);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    one[i] = masked(m[i], one[i]);
    other[i] = masked(m[i], other[i]);
  }
}

// Applies several masks to values, or to two gradients, one mask after the other.
template <class... Values>
__device__ __forceinline__ void apply_masks(const UpToMost<Table>& tables, const Token& token, int64_t first,
                                            Values&... values) {
#pragma unroll
  for (int i = 0; i < MOST_MASKS; ++i) apply_mask(tables[i], token, first, values...);
}

template <Activation activation, int N>
__device__ __forceinline__ void values_and_derivatives(const float (&a)[N], float (&value)[N], float (&derivative)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) value_and_derivative<activation>(a[i], value[i], derivative[i]);
}

// act(a) and act'(a) of a vector. The activation is a branch that all threads take alike and no parameter of the
// kernels' templates: there are a fifth as many kernels.
template <int N>
__device__ __forceinline__ void values_and_derivatives(Activation activation, const float (&a)[N], float (&value)[N],
                                                       float (&derivative)[N]) {
  GRADROUTE_SWITCH_ACTIVATION(activation, values_and_derivatives<ACTIVATION>(a, value, derivative));
}

template <int N>
__device__ __forceinline__ void add_to(float (&total)[N], const float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) total[i] += values[i];
}

// Stores a row of `sums` over the tile of features that begins at `first`: the totals of the tile's rows of threads,
// added in order. Every thread of a block calls it.
template <int N>
__device__ __forceinline__ void store_sums(const Matrix& sums, int64_t run, int64_t first, const float (&total)[N]) {
  __shared__ float totals[TILE_ROWS][TILE_LANES * N];
#pragma unroll
  for (int i = 0; i < N; ++i) totals[threadIdx.y][threadIdx.x * N + i] = total[i];
  __syncthreads();
  for (int feature = threadIdx.y * TILE_LANES + threadIdx.x; feature < TILE_LANES * N; feature += TILE_THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int row = 0; row < TILE_ROWS; ++row) sum += totals[row][feature];
    if (first + feature < sums.cols) *address<float, 1>(sums, run, first + feature) = sum;
  }
  __syncthreads();  // the next sums use the same memory
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is at least n, capped at `most`, a power of two.
inline unsigned lanes_for(int64_t n, unsigned most) {
  unsigned lanes = 1;
  while (lanes < most && lanes < n) lanes *= 2;
  return lanes;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % BYTES_PER_ACCESS == 0; }

// Whether rows can be read n features at a time. An absent matrix is no obstacle.
inline bool takes_vectors(const Matrix& m, int64_t n) {
  return m.data == nullptr || (m.col_stride == 1 && m.cols % n == 0 && is_aligned(m.data) &&
                               (m.rows == 1 || m.row_stride * size_of(m.dtype) % BYTES_PER_ACCESS == 0));
}

inline bool takes_vectors(const Heads& x, int64_t n) {
  if (x.data == nullptr) return true;
  bool aligned = x.strides[3] == 1 && x.shape[3] % n == 0 && is_aligned(x.data);
  for (int i = 0; i < 3; ++i) aligned &= x.shape[i] == 1 || x.strides[i] * size_of(x.dtype) % BYTES_PER_ACCESS == 0;
  return aligned;
}

inline bool takes_vectors(const Table& table, int64_t) { return table.cols <= 1 || is_aligned(table.weights); }

inline bool takes_vectors(const Mask& mask, int64_t n) { return takes_vectors(mask.table, n); }

inline bool takes_vectors(const UpToMost<Table>& tables, int64_t n) {
  return std::all_of(tables, tables + MOST_MASKS, [n](const Table& table) { return takes_vectors(table, n); });
}

inline bool takes_vectors(const MLPMasks& masks, int64_t n) {
  return takes_vectors(masks.gradient, n) && takes_vectors(masks.z, n) && takes_vectors(masks.update, n);
}

template <class... Operands>
bool all_take_vectors(int64_t n, const Operands&... operands) {
  return (takes_vectors(operands, n) && ...);
}

inline void refuse_float64(const char* function, Dtype dtype) {
  if (dtype == Dtype::float64) throw std::invalid_argument(std::string(function) + ": CUDA kernels take no float64");
}

template <class E, class Body, class... Operands>
void with_width(const Body& body, const Operands&... operands) {
  constexpr int N = BYTES_PER_ACCESS / sizeof(E);
  if (all_take_vectors(N, operands...))
    body(Access<E, N>());
  else
    body(Access<E, 1>());
}

// Calls body with the Access to matrices of this dtype: vectors where all the operands take them.
template <class Body, class... Operands>
void with_access(const char* function, Dtype dtype, const Body& body, const Operands&... operands) {
  refuse_float64(function, dtype);
  if (dtype == Dtype::float32) return with_width<float>(body, operands...);
  if (dtype == Dtype::bfloat16) return with_width<__nv_bfloat16>(body, operands...);
  with_width<__half>(body, operands...);
}

inline void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error: the next launch would be blamed for it
  throw std::runtime_error(std::string("gradroute: ") + what + ": " + cudaGetErrorString(error));
}

// Makes the stream's device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Stream& stream) : device(stream.device) {
    check("cudaGetDevice", cudaGetDevice(&previous));
    if (previous != device) check("cudaSetDevice", cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (previous != device) cudaSetDevice(previous);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device, previous = 0;
};

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes = 0;
};

// Launches kernel(arguments...) on the stream, whose device is made current for it.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Stream& stream,
            const Parameters&... arguments) {
  const DeviceGuard guard(stream);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  check(name, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// A grid with one block for each run of tokens and TILE_LANES vectors of n features.
inline Grid tiles(int64_t tokens, int64_t features, int64_t n) {
  const int64_t runs = ceil_div(tokens, TOKENS_PER_SUM);
  return {dim3(ceil_div(features, TILE_LANES * n), std::min(runs, MAX_GRID_Y)), dim3(TILE_LANES, TILE_ROWS)};
}

}  // namespace
}  // namespace gradroute
