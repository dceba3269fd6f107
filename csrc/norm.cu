// The backward of RMS norm and layer norm, the update mask folded in: dx and the sums of dW and db in one launch.
// Rows of up to 16 KB stay in registers, while the next ones are being loaded; longer rows, and rows that take no
// vectors, are read again from the cache.
#include "cuda.cuh"

namespace gradroute {
namespace {

constexpr int VECTORS = 2;  // how many of a row a thread holds
constexpr int MAX_THREADS = 512;
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr int THREADS = 256;  // a block's threads where it handles several short rows at a time

// The longest rows in fp32 fit into the shared memory that a block has without asking for more, beside sums over rows.
static_assert(MAX_THREADS * VECTORS * (BYTES_PER_ACCESS / 2) * 4 <= 47 * 1024,
              "half-precision rows have most features");

constexpr int CHUNK_ROWS = 4;  // rows that are handled at once where they do not stay in registers

// How many rows a block has where it makes no sums.
constexpr int64_t TOKENS_WITHOUT_SUMS = 16;

// The operands, with their numbers as the kernels use them.
struct NormArguments : NormOperands {
  float eps, offset;
  int64_t tokens_per_block;

  NormArguments(const NormOperands& p, int64_t tokens_per_block)
      : NormOperands(p), eps(float(p.eps)), offset(float(p.offset)), tokens_per_block(tokens_per_block) {}
};

// How many features of x and of dy are read at once.
template <class G, class X>
constexpr int features_per_vector = BYTES_PER_ACCESS / (sizeof(G) > sizeof(X) ? sizeof(G) : sizeof(X));

// The element of matrices whose dtype is looked up while running; read as float.
struct Any {};

template <class E>
using Kept = std::conditional_t<std::is_same_v<E, Any>, float, E>;

template <class E, int N>
__device__ __forceinline__ Vector<float, N> widened(const Vector<E, N>& vector) {
  Vector<float, N> wide;
  unpack(vector, wide.at);
  return wide;
}

template <class E, int N>
__device__ __forceinline__ Vector<Kept<E>, N> read(const Matrix& m, int64_t row, int64_t first) {
  if constexpr (std::is_same_v<E, Any>) {
    if (m.dtype == Dtype::bfloat16) return widened(load<__nv_bfloat16, N>(m, row, first));
    if (m.dtype == Dtype::float16) return widened(load<__half, N>(m, row, first));
    return load<float, N>(m, row, first);
  } else {
    return load<E, N>(m, row, first);
  }
}

template <class E, int N>
__device__ __forceinline__ void write(const Matrix& m, int64_t row, int64_t first, const float (&values)[N]) {
  if constexpr (std::is_same_v<E, Any>) {
    if (m.dtype == Dtype::bfloat16) return store<__nv_bfloat16, N>(m, row, first, values);
    if (m.dtype == Dtype::float16) return store<__half, N>(m, row, first, values);
    store<float, N>(m, row, first, values);
  } else {
    store<E, N>(m, row, first, values);
  }
}

// Rounds x to the dtype of m and back.
template <class E>
__device__ __forceinline__ float rounded_as(const Matrix& m, float x) {
  if constexpr (std::is_same_v<E, Any>) {
    if (m.dtype == Dtype::bfloat16) return rounded<__nv_bfloat16>(x);
    return m.dtype == Dtype::float16 ? rounded<__half>(x) : x;
  } else {
    return rounded<E>(x);
  }
}

// weight + offset at the features [first, first + N); without a weight nobody asks for what depends on it.
template <int N>
__device__ __forceinline__ void load_scale(const NormArguments& p, int64_t first, float (&scale)[N]) {
  const bool present = p.weight.data != nullptr;
  const Vector<float, N> weight = present ? read<Any, N>(p.weight, 0, first) : Vector<float, N>{};
#pragma unroll
  for (int i = 0; i < N; ++i) scale[i] = weight.at[i] + p.offset;
}

// Sums K values over the blockDim.x threads of a row; each threadIdx.y has its row. Every thread of a block calls it.
template <int K>
__device__ __forceinline__ void sum_over_row(float (&values)[K]) {
  __shared__ float scratch[MAX_WARPS][K];
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
      values[k] += __shfl_xor_sync(WHOLE_WARP, values[k], distance);
  const int warps = blockDim.x / WARP, first = threadIdx.y * warps;
  __syncthreads();  // every thread has read the sums before these
  if (threadIdx.x % WARP == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) scratch[first + threadIdx.x / WARP][k] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = 0.0f;
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += scratch[first + warp][k];
  }
}

// A row's mean and so on, which dx and the sums need beside the row itself.
struct Statistics {
  float mean = 0.0f, rstd = 0.0f;         // mean and 1 / root mean square of x
  float total = 0.0f, projection = 0.0f;  // the means of dx̂ and of dx̂ ⊙ x̂
};

// Adds Σ x and Σ dx̂ to sums.
template <int N>
__device__ __forceinline__ void add_first_moments(const float (&x)[N], const float (&g)[N], const float (&scale)[N],
                                                  float& x_sum, float& total) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x_sum += x[i];
    total += g[i] * scale[i];
  }
}

// Adds Σ (x - mean)² and Σ dx̂ ⊙ (x - mean) to sums.
template <int N>
__device__ __forceinline__ void add_second_moments(const float (&x)[N], const float (&g)[N], const float (&scale)[N],
                                                   float mean, float& squares, float& projection) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float centered = x[i] - mean;
    squares += centered * centered;
    projection += g[i] * scale[i] * centered;
  }
}

// Stores dx of a vector, and adds the vector's part to the sums of dW and db.
template <class X, int N>
__device__ __forceinline__ void finish_vector(const NormArguments& p, const Token& token, int64_t row, int64_t first,
                                              const Statistics& s, const float (&x)[N], const float (&g)[N],
                                              const float (&scale)[N], float (&weight_total)[N],
                                              float (&bias_total)[N]) {
  float x_hat[N], values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x_hat[i] = (x[i] - s.mean) * s.rstd;
    values[i] = s.rstd * (g[i] * scale[i] - s.total - x_hat[i] * s.projection);
  }
  if (p.dx.data != nullptr) write<X, N>(p.dx, row, first, values);
  if (p.weight_sums.data != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = (p.round_x_hat ? rounded_as<X>(p.x, x_hat[i]) : x_hat[i]) * g[i];
    apply_mask(p.update.table, token, first, values);
    add_to(weight_total, values);
  }
  if (p.bias_sums.data != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = g[i];
    apply_mask(p.update.table, token, first, values);
    add_to(bias_total, values);
  }
}

// The vectors of a row that belong to one thread; zeros beyond the row's end and beyond the last row.
template <class G, class X, int N>
struct Row {
  Vector<G, N> dy[VECTORS];
  Vector<X, N> x[VECTORS];
};

// The first feature of a thread's vector.
template <int N>
__device__ __forceinline__ int first_of(int vector) {
  return (vector * blockDim.x + threadIdx.x) * N;
}

template <class G, class X, int N>
__device__ __forceinline__ Row<G, X, N> load_row(const NormArguments& p, int64_t row, int64_t last) {
  Row<G, X, N> loaded = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int first = first_of<N>(v);
    if (row >= last || first >= p.x.cols) continue;
    loaded.x[v] = load<X, N>(p.x, row, first);
    loaded.dy[v] = load<G, N>(p.dy, row, first);
  }
  return loaded;
}

// Calls body(v, first, x, g, scale) for a thread's vectors of a row.
template <class G, class X, int N, class Body>
__device__ __forceinline__ void for_vectors(const NormArguments& p, const Row<G, X, N>& row, const float* scales,
                                            const Body& body) {
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int first = first_of<N>(v);
    if (first >= p.x.cols) continue;
    float x[N], g[N], scale[N];
    unpack(row.x[v], x);
    unpack(row.dy[v], g);
    unpack(*reinterpret_cast<const Vector<float, N>*>(scales + first), scale);
    body(v, first, x, g, scale);
  }
}

// Every thread of a block calls it.
template <class G, class X, int N>
__device__ __forceinline__ Statistics statistics_of(const NormArguments& p, const Row<G, X, N>& row,
                                                    const float* scales) {
  Statistics s;
  const float share = 1.0f / float(p.x.cols);
  if (p.centered) {
    float sums[2] = {};
    for_vectors(p, row, scales, [&](int, int, const float (&x)[N], const float (&g)[N], const float (&scale)[N]) {
      add_first_moments(x, g, scale, sums[0], sums[1]);
    });
    sum_over_row(sums);
    s.mean = sums[0] * share;
    s.total = sums[1] * share;
  }
  float sums[2] = {};
  for_vectors(p, row, scales, [&](int, int, const float (&x)[N], const float (&g)[N], const float (&scale)[N]) {
    add_second_moments(x, g, scale, s.mean, sums[0], sums[1]);
  });
  sum_over_row(sums);
  s.rstd = rsqrtf(sums[0] * share + p.eps);
  s.projection = s.rstd * sums[1] * share;
  return s;
}

// Stores a row of sums: the totals of the block's rows of threads, added in order. Every thread of a block calls it;
// `memory` holds one row for each row of threads.
template <int N>
__device__ __forceinline__ void store_row_sums(const NormArguments& p, const Matrix& sums, float* memory,
                                               const float (&totals)[VECTORS][N]) {
  __syncthreads();  // every thread has read what the memory held before
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int first = first_of<N>(v);
    if (first >= p.x.cols) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) memory[threadIdx.y * p.x.cols + first + i] = totals[v][i];
  }
  __syncthreads();
  const int threads = blockDim.x * blockDim.y;
  for (int feature = threadIdx.y * blockDim.x + threadIdx.x; feature < p.x.cols; feature += threads) {
    float sum = 0.0f;
    for (int group = 0; group < blockDim.y; ++group) sum += memory[group * p.x.cols + feature];
    *address<float, 1>(sums, blockIdx.x, feature) = sum;
  }
}

// A block has a run of rows, and blockDim.y of them at a time. Shared memory: blockDim.y rows of fp32, which hold the
// scale first.
template <class G, class X>
__global__ __launch_bounds__(MAX_THREADS, 1) void norm_backward_rows_kernel(const __grid_constant__ NormArguments p) {
  constexpr int N = features_per_vector<G, X>;
  extern __shared__ float4 memory[];
  float* scales = reinterpret_cast<float*>(memory);
  for (int first = (threadIdx.y * blockDim.x + threadIdx.x) * N; first < p.x.cols; first += blockDim.x * blockDim.y * N)
    load_scale(p, first, *reinterpret_cast<float (*)[N]>(scales + first));
  __syncthreads();
  const int64_t begin = blockIdx.x * p.tokens_per_block, last = min(begin + p.tokens_per_block, p.x.rows);
  float weight_total[VECTORS][N] = {}, bias_total[VECTORS][N] = {};
  Row<G, X, N> next = load_row<G, X, N>(p, begin + threadIdx.y, last);
#pragma unroll 1
  for (int64_t start = begin; start < last; start += blockDim.y) {
    const int64_t row = start + threadIdx.y;
    const Row<G, X, N> current = next;
    next = load_row<G, X, N>(p, row + blockDim.y, last);
    const Statistics s = statistics_of(p, current, scales);
    if (row >= last) continue;
    const Token token(p.update.routing, row);
    for_vectors(p, current, scales,
                [&](int v, int first, const float (&x)[N], const float (&g)[N], const float (&scale)[N]) {
                  finish_vector<X>(p, token, row, first, s, x, g, scale, weight_total[v], bias_total[v]);
                });
  }
  if (p.weight_sums.data != nullptr) store_row_sums(p, p.weight_sums, scales, weight_total);
  if (p.bias_sums.data != nullptr) store_row_sums(p, p.bias_sums, scales, bias_total);
}

// The same vector of CHUNK_ROWS rows, the last of which may be repeated.
template <class G, class X, int N>
struct Chunk {
  Vector<Kept<G>, N> dy[CHUNK_ROWS];
  Vector<Kept<X>, N> x[CHUNK_ROWS];
};

// Calls body(first, chunk, scale) for a thread's vectors of the rows from `start` on.
template <class G, class X, int N, class Body>
__device__ __forceinline__ void for_chunks(const NormArguments& p, int64_t start, int64_t last, const Body& body) {
#pragma unroll 1
  for (int64_t first = threadIdx.x * N; first < p.x.cols; first += blockDim.x * N) {
    Chunk<G, X, N> chunk;
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      const int64_t row = min(start + r, last - 1);
      chunk.x[r] = read<X, N>(p.x, row, first);
      chunk.dy[r] = read<G, N>(p.dy, row, first);
    }
    float scale[N];
    load_scale(p, first, scale);
    body(first, chunk, scale);
  }
}

// Every thread of a block calls it.
template <class G, class X, int N>
__device__ __forceinline__ void chunk_statistics(const NormArguments& p, int64_t start, int64_t last,
                                                 Statistics (&s)[CHUNK_ROWS]) {
  const float share = 1.0f / float(p.x.cols);
  if (p.centered) {
    float sums[2 * CHUNK_ROWS] = {};
    for_chunks<G, X, N>(p, start, last, [&](int64_t, const Chunk<G, X, N>& chunk, const float (&scale)[N]) {
#pragma unroll
      for (int r = 0; r < CHUNK_ROWS; ++r) {
        float x[N], g[N];
        unpack(chunk.x[r], x);
        unpack(chunk.dy[r], g);
        add_first_moments(x, g, scale, sums[2 * r], sums[2 * r + 1]);
      }
    });
    sum_over_row(sums);
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      s[r].mean = sums[2 * r] * share;
      s[r].total = sums[2 * r + 1] * share;
    }
  }
  float sums[2 * CHUNK_ROWS] = {};
  for_chunks<G, X, N>(p, start, last, [&](int64_t, const Chunk<G, X, N>& chunk, const float (&scale)[N]) {
#pragma unroll
    for (int r = 0; r < CHUNK_ROWS; ++r) {
      float x[N], g[N];
      unpack(chunk.x[r], x);
      unpack(chunk.dy[r], g);
      add_second_moments(x, g, scale, s[r].mean, sums[2 * r], sums[2 * r + 1]);
    }
  });
  sum_over_row(sums);
#pragma unroll
  for (int r = 0; r < CHUNK_ROWS; ++r) {
    s[r].rstd = rsqrtf(sums[2 * r] * share + p.eps);
    s[r].projection = s[r].rstd * sums[2 * r + 1] * share;
  }
}

// Adds to a row of sums, of which each feature belongs to one thread; the block's first rows overwrite it.
template <int N>
__device__ __forceinline__ void add_to_sums(const Matrix& sums, int64_t first, bool begins, const float (&total)[N]) {
  if (sums.data == nullptr) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float* sum = address<float, 1>(sums, blockIdx.x, first + i);
    *sum = begins ? total[i] : *sum + total[i];
  }
}

// A block has a run of rows, and CHUNK_ROWS of them at a time.
template <class G, class X, int N>
__global__ __launch_bounds__(MAX_THREADS, 1) void norm_backward_chunks_kernel(const __grid_constant__ NormArguments p) {
  const int64_t begin = blockIdx.x * p.tokens_per_block, last = min(begin + p.tokens_per_block, p.x.rows);
#pragma unroll 1
  for (int64_t start = begin; start < last; start += CHUNK_ROWS) {
    Statistics s[CHUNK_ROWS];
    chunk_statistics<G, X, N>(p, start, last, s);
    for_chunks<G, X, N>(p, start, last, [&](int64_t first, const Chunk<G, X, N>& chunk, const float (&scale)[N]) {
      float weight_total[N] = {}, bias_total[N] = {};
#pragma unroll
      for (int r = 0; r < CHUNK_ROWS; ++r) {
        if (start + r >= last) break;
        float x[N], g[N];
        unpack(chunk.x[r], x);
        unpack(chunk.dy[r], g);
        const Token token(p.update.routing, start + r);
        finish_vector<X>(p, token, start + r, first, s[r], x, g, scale, weight_total, bias_total);
      }
      add_to_sums(p.weight_sums, first, start == begin, weight_total);
      add_to_sums(p.bias_sums, first, start == begin, bias_total);
    });
  }
}

template <class G, class X, int N>
void launch_chunks(const NormArguments& p, const Stream& stream) {
  const dim3 blocks(ceil_div(p.x.rows, p.tokens_per_block));
  const dim3 threads(std::min<int64_t>(MAX_THREADS, ceil_div(ceil_div(p.x.cols, N), WARP) * WARP));
  launch("norm_backward_chunks_kernel", norm_backward_chunks_kernel<G, X, N>, {blocks, threads}, stream, p);
}

template <class G, class X>
void launch_rows(const NormArguments& p, const Stream& stream) {
  constexpr int N = features_per_vector<G, X>;
  const unsigned lanes = ceil_div(ceil_div(p.x.cols, VECTORS * N), WARP) * WARP;
  const dim3 blocks(ceil_div(p.x.rows, p.tokens_per_block)), threads(lanes, std::max(1u, THREADS / lanes));
  launch("norm_backward_rows_kernel", norm_backward_rows_kernel<G, X>,
         {blocks, threads, threads.y * p.x.cols * sizeof(float)}, stream, p);
}

// Launches with vectors where every matrix takes them, and keeps rows in registers where they fit.
template <class G, class X>
void launch_typed(const NormArguments& p, const Stream& stream) {
  constexpr int N = features_per_vector<G, X>;
  const bool vectors = p.dx.data == nullptr || p.dx.dtype == p.x.dtype;
  if (!vectors || !all_take_vectors(N, p.dy, p.x, p.weight, p.dx, p.update))
    launch_chunks<Any, Any, 1>(p, stream);
  else if (p.x.cols <= MAX_THREADS * VECTORS * N)
    launch_rows<G, X>(p, stream);
  else
    launch_chunks<G, X, N>(p, stream);
}

// Launches for the dtypes that meet in models: dy has x's, or is fp32 where an fp32 weight met a half-precision x.
void launch_norm(const NormArguments& p, const Stream& stream) {
  const Dtype g = p.dy.dtype, x = p.x.dtype;
  if (g == Dtype::float32 && x == Dtype::float32) return launch_typed<float, float>(p, stream);
  if (g == Dtype::float32 && x == Dtype::bfloat16) return launch_typed<float, __nv_bfloat16>(p, stream);
  if (g == Dtype::float32 && x == Dtype::float16) return launch_typed<float, __half>(p, stream);
  if (g == Dtype::bfloat16 && x == Dtype::bfloat16) return launch_typed<__nv_bfloat16, __nv_bfloat16>(p, stream);
  if (g == Dtype::float16 && x == Dtype::float16) return launch_typed<__half, __half>(p, stream);
  launch_chunks<Any, Any, 1>(p, stream);
}

}  // namespace

namespace cuda {

void norm_backward(const NormOperands& p, const Stream& stream) {
  for (const Matrix& m : {p.dy, p.x, p.weight, p.dx}) refuse_float64("norm_backward", m.dtype);
  if (p.x.rows == 0 || p.x.cols == 0) return;
  const bool sums = p.weight_sums.data != nullptr || p.bias_sums.data != nullptr;
  launch_norm({p, sums ? TOKENS_PER_SUM : TOKENS_WITHOUT_SUMS}, stream);
}

}  // namespace cuda
}  // namespace gradroute
