// The steps of RoutedAdamW on parameters, as many in a launch as fit into a kernel's arguments.
#include <vector>

#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int THREADS = 256;

// Arguments of a kernel have 4096 bytes: these many parameters' share them with what is the same for all.
constexpr int MOST_STEPS = 24;
constexpr int MOST_GRADIENTS = 48;

// How many rows, and vectors of features below each other, a thread takes one after the other.
constexpr int STEP_ROWS = 4;
constexpr int FIND_ROWS = 32;

// The elements of one parameter's tensor, whose shape is that of its `Part`.
struct Elements {
  void* data;
  int64_t row_stride, col_stride;

  Elements() = default;
  explicit Elements(const Matrix& m) : data(m.data), row_stride(m.row_stride), col_stride(m.col_stride) {}

  __device__ __forceinline__ operator Matrix() const {
    Matrix m;
    m.data = data;
    m.row_stride = row_stride;
    m.col_stride = col_stride;
    return m;
  }
};

// A parameter's part of a launch.
struct Part {
  int64_t rows, cols;
  int64_t first_block;  // of blocks of threads
  int64_t first;        // the column of its first block's factors or flags among those of all parameters
  Blocks blocks;
  unsigned lanes;  // threads side by side, a power of two

  __host__ __device__ __forceinline__ unsigned lines() const { return THREADS / lanes; }
};

struct StepPart : Part {
  Elements p, g, m, v, largest;
  bool wide;  // factors of columns are aligned for vectors of them
};

struct FindPart : Part {
  Elements g;
};

struct Step {
  int64_t count;
  const float* factors;
  int64_t factors_stride;
  AdamW<float> options;
  bool stochastic;
  StepPart parts[MOST_STEPS];
};

struct Find {
  int64_t count;
  uint8_t* touched;
  FindPart parts[MOST_GRADIENTS];
};
static_assert(sizeof(Step) <= 4096 && sizeof(Find) <= 4096, "arguments of a kernel");

// The part of a launch that a block of threads works on, the last one that begins before it.
template <class Arguments>
__device__ __forceinline__ int part_of(const Arguments& a, int64_t block) {
  int part = 0;
  while (part + 1 < a.count && a.parts[part + 1].first_block <= block) ++part;
  return part;
}

// One row of the factors at the elements [row, first .. first + N).
template <int N>
__device__ __forceinline__ void load_factors(const Step& a, const StepPart& part, int which, int64_t row, int64_t first,
                                             float (&factors)[N]) {
  const float* from = a.factors + which * a.factors_stride + part.first;
  if (part.blocks != Blocks::columns) {
    const float factor = __ldg(from + (part.blocks == Blocks::rows ? row : 0));
#pragma unroll
    for (int i = 0; i < N; ++i) factors[i] = factor;
  } else if (part.wide) {
    load_weights(from + first, factors);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) factors[i] = __ldg(from + first + i);
  }
}

// Stores the values of elements that are touched; the other elements are written as they were read.
template <class E, int N>
__device__ __forceinline__ void store_touched(const Matrix& to, int64_t row, int64_t first, const Vector<E, N>& old,
                                              const float (&values)[N], const bool (&touched)[N]) {
  Vector<E, N> vector = pack<E>(values);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (!touched[i]) vector.at[i] = old.at[i];
  store<E, N>(to, row, first, vector);
}

template <int N>
__device__ __forceinline__ void round_by(const uint32_t (&random)[N], int shift, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_bfloat16_by(random[i] >> shift, values[i]);
}

// The elements [row, first .. first + N) of a parameter of type E, with moments of type M. Vectors without a touched
// element are neither read nor written.
template <class E, class M, int N>
__device__ __forceinline__ void update(const Step& a, const StepPart& part, int64_t row, int64_t first) {
  const bool has_largest = part.largest.data != nullptr;
  float decay[N], size[N], scale[N], touches[N];
  load_factors(a, part, 3, row, first, touches);
  bool touched[N], any = false;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    touched[i] = touches[i] != 0.0f;
    any |= touched[i];
  }
  if (!any) return;
  const Vector<E, N> p_old = load<E, N>(part.p, row, first), g_read = load<E, N>(part.g, row, first);
  const Vector<M, N> m_old = load<M, N>(part.m, row, first), v_old = load<M, N>(part.v, row, first),
                     largest_old = has_largest ? load<M, N>(part.largest, row, first) : Vector<M, N>{};
  load_factors(a, part, 0, row, first, decay);
  load_factors(a, part, 1, row, first, size);
  load_factors(a, part, 2, row, first, scale);
  float p[N], g[N], m[N], v[N], largest[N];
  unpack(p_old, p);
  unpack(g_read, g);
  unpack(m_old, m);
  unpack(v_old, v);
  unpack(largest_old, largest);
  uint32_t random[N];
  if (a.stochastic) {
    float counts[N];
    load_factors(a, part, 4, row, first, counts);
#pragma unroll
    for (int i = 0; i < N; ++i) random[i] = random_bits(g[i], p[i], m[i], v[i], counts[i]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    adamw(a.options, BlockFactors<float>{decay[i], size[i], scale[i]}, has_largest, g[i], p[i], m[i], v[i], largest[i]);
  if (a.stochastic) {
    round_by(random, 0, m);
    round_by(random, 16, v);
    round_by(random, 16, largest);
  }
  store_touched(part.p, row, first, p_old, p, touched);
  store_touched(part.m, row, first, m_old, m, touched);
  store_touched(part.v, row, first, v_old, v, touched);
  if (has_largest) store_touched(part.largest, row, first, largest_old, largest, touched);
}

template <class E, class M, int N>
__global__ __launch_bounds__(THREADS) void adamw_step_kernel(const __grid_constant__ Step a) {
  const StepPart& part = a.parts[part_of(a, blockIdx.x)];
  const int64_t tile = blockIdx.x - part.first_block, across = (part.cols + part.lanes * N - 1) / (part.lanes * N);
  const int64_t first = (tile % across * part.lanes + threadIdx.x % part.lanes) * N;
  if (first >= part.cols) return;
  const int64_t top = tile / across * part.lines() * STEP_ROWS + threadIdx.x / part.lanes;
  for (int i = 0; i < STEP_ROWS; ++i) {
    const int64_t row = top + i * part.lines();
    if (row < part.rows) update<E, M, N>(a, part, row, first);
  }
}

// Which of the elements [row, first .. first + N) are not 0, of any sign. E is an unsigned integer.
template <class E, int N>
__device__ __forceinline__ unsigned nonzeros(const FindPart& part, int64_t row, int64_t first) {
  if (row >= part.rows || first >= part.cols) return 0;
  const Vector<E, N> vector = load<E, N>(part.g, row, first);
  unsigned found = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) found |= unsigned(E(vector.at[i] << 1) != 0) << i;
  return found;
}

// Every warp walks along one row, or down the columns of its lanes, until it knows all that it asks for. Several warps
// may write the same flag, all of them a 1.
template <class E, int N>
__global__ __launch_bounds__(THREADS) void touched_blocks_kernel(const __grid_constant__ Find a) {
  const FindPart& part = a.parts[part_of(a, blockIdx.x)];
  const int64_t tile = blockIdx.x - part.first_block;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  uint8_t* flags = a.touched + part.first;
  if (part.blocks == Blocks::rows) {
    const int64_t row = tile * (THREADS / WARP) + warp;
    unsigned any = 0;
    for (int64_t col = 0; col < part.cols && row < part.rows && any == 0; col += WARP * N)
      any = __ballot_sync(WHOLE_WARP, nonzeros<E, N>(part, row, col + lane * N) != 0);
    if (any != 0 && lane == 0) flags[row] = 1;
    return;
  }
  const int64_t across = (part.cols + WARP * N - 1) / (WARP * N), first = (tile % across * WARP + lane) * N;
  const int64_t top = (tile / across * (THREADS / WARP) + warp) * FIND_ROWS;
  const bool one = part.blocks == Blocks::one;
  const unsigned all = (1u << N) - 1;
  unsigned found = 0, left = WHOLE_WARP;
  for (int64_t row = top; row < top + FIND_ROWS && row < part.rows && left != 0; ++row) {
    found |= nonzeros<E, N>(part, row, first);
    // With one block any element will do; columns beyond the last are not waited for.
    left = __ballot_sync(WHOLE_WARP, one ? found == 0 : found != all && first < part.cols);
    if (one && left != WHOLE_WARP) break;
  }
  if (first >= part.cols || found == 0) return;
  if (one) {
    *flags = 1;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (found >> i & 1) flags[first + i] = 1;
}

// Launches a kernel on parts that have blocks of threads, as many at a time as its arguments take.
template <class Arguments, class PartOf>
void launch_parts(const char* name, void (*kernel)(Arguments), const Stream& stream, const Arguments& common,
                  const std::vector<PartOf>& parts, const std::vector<int64_t>& blocks) {
  constexpr int64_t MOST = sizeof(Arguments::parts) / sizeof(PartOf);
  for (int64_t begin = 0, count = parts.size(); begin < count; begin += MOST) {
    Arguments arguments = common;
    arguments.count = std::min(MOST, count - begin);
    int64_t total = 0;
    for (int64_t i = 0; i < arguments.count; ++i) {
      arguments.parts[i] = parts[begin + i];
      arguments.parts[i].first_block = total;
      total += blocks[begin + i];
    }
    launch(name, kernel, Grid{dim3(total), dim3(THREADS)}, stream, arguments);
  }
}

template <class E, class M, int N>
void step(const AdamWOperands& p, const Stream& stream, bool vectors) {
  constexpr int WIDE = BYTES_PER_ACCESS / sizeof(E);
  const Step common{0,
                    static_cast<const float*>(p.factors.data),
                    p.factors.row_stride,
                    AdamW<float>(p.beta1, p.beta2, p.eps, p.maximize),
                    p.stochastic,
                    {}};
  std::vector<StepPart> parts;
  std::vector<int64_t> blocks;
  for (const AdamWTensors& one : p.tensors) {
    const Matrix& m = one.parameter;
    const bool takes = all_take_vectors(WIDE, m, one.gradient, one.exp_avg, one.exp_avg_sq, one.max_exp_avg_sq);
    if (m.rows == 0 || m.cols == 0 || takes != vectors) continue;
    StepPart part{};
    part.rows = m.rows;
    part.cols = m.cols;
    part.first = one.first;
    part.blocks = one.blocks;
    part.lanes = lanes_for(ceil_div(m.cols, N), THREADS);
    part.p = Elements(m);
    part.g = Elements(one.gradient);
    part.m = Elements(one.exp_avg);
    part.v = Elements(one.exp_avg_sq);
    part.largest = Elements(one.max_exp_avg_sq);
    part.wide = is_aligned(common.factors + one.first) && p.factors.row_stride % 4 == 0;
    parts.push_back(part);
    blocks.push_back(ceil_div(ceil_div(m.cols, N), part.lanes) * ceil_div(m.rows, part.lines() * STEP_ROWS));
  }
  launch_parts("adamw_step_kernel", adamw_step_kernel<E, M, N>, stream, common, parts, blocks);
}

template <class E, class M>
void step(const AdamWOperands& p, const Stream& stream) {
  step<E, M, BYTES_PER_ACCESS / sizeof(E)>(p, stream, true);
  step<E, M, 1>(p, stream, false);
}

// Moments are of the parameters' dtype, of bfloat16 or fp32.
template <class E>
void step_of(const AdamWOperands& p, const Stream& stream) {
  const Dtype parameter = p.tensors.data->parameter.dtype, moment = p.tensors.data->exp_avg.dtype;
  if (moment == parameter) return step<E, E>(p, stream);
  if (moment == Dtype::bfloat16) return step<E, __nv_bfloat16>(p, stream);
  step<E, float>(p, stream);
}

template <class E, int N>
void find(const TouchedOperands& p, const Stream& stream, bool vectors) {
  constexpr int WIDE = BYTES_PER_ACCESS / sizeof(E), WARPS = THREADS / WARP;
  Find common{};
  common.touched = p.touched;
  std::vector<FindPart> parts;
  std::vector<int64_t> blocks;
  for (const BlockedGradient& one : p.gradients) {
    const Matrix& g = one.gradient;
    if (g.rows == 0 || g.cols == 0 || takes_vectors(g, WIDE) != vectors) continue;
    FindPart part{};
    part.rows = g.rows;
    part.cols = g.cols;
    part.first = one.first;
    part.blocks = one.blocks;
    part.lanes = WARP;
    part.g = Elements(g);
    parts.push_back(part);
    blocks.push_back(one.blocks == Blocks::rows ? ceil_div(g.rows, WARPS)
                                                : ceil_div(g.cols, WARP * N) * ceil_div(g.rows, WARPS * FIND_ROWS));
  }
  launch_parts("touched_blocks_kernel", touched_blocks_kernel<E, N>, stream, common, parts, blocks);
}

template <class E>
void find(const TouchedOperands& p, const Stream& stream) {
  find<E, BYTES_PER_ACCESS / sizeof(E)>(p, stream, true);
  find<E, 1>(p, stream, false);
}

}  // namespace

namespace cuda {

void touched_blocks(const TouchedOperands& p, const Stream& stream) {
  if (p.gradients.count == 0) return;
  const Dtype dtype = p.gradients.data->gradient.dtype;
  refuse_float64("touched_blocks", dtype);
  if (dtype == Dtype::float32) return find<uint32_t>(p, stream);
  find<uint16_t>(p, stream);
}

void adamw_step(const AdamWOperands& p, const Stream& stream) {
  if (p.tensors.count == 0) return;
  const Dtype dtype = p.tensors.data->parameter.dtype;
  refuse_float64("adamw_step", dtype);
  if (dtype == Dtype::float32) return step_of<float>(p, stream);
  if (dtype == Dtype::bfloat16) return step_of<__nv_bfloat16>(p, stream);
  step_of<__half>(p, stream);
}

}  // namespace cuda
}  // namespace gradroute
