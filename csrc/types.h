// What Python hands over: addresses with shapes and strides, no tensors. Devices, memory and alignment are checked
// there (gradroute/native.py), shapes and dtypes by the public functions; never again here.
#pragma once

#include <cstdint>

namespace gradroute {

enum class Dtype : int { float32, bfloat16, float16, float64 };

enum class Activation : int { silu, gelu, gelu_tanh, relu, relu2 };

// [rows, cols] in somebody else's memory; absent where data is null. Strides are in elements.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  Dtype dtype = Dtype::float32;
};

// [batch, heads, sequence, features] of attention; absent where data is null.
struct Heads {
  void* data = nullptr;
  int64_t shape[4] = {};
  int64_t strides[4] = {};
  Dtype dtype = Dtype::float32;
};

// The routes of T tokens, and how far each mask goes from route 0's row (0) to its own route's (1).
struct Routing {
  const int32_t* ids = nullptr;    // [T]
  const void* strength = nullptr;  // [T], one value with stride 0, or absent
  int64_t strength_stride = 0;
  bool strength_is_double = false;
};

// The weights [R, cols] of a site; cols = 1 is broadcast over the features. Absent: no mask.
struct Table {
  const float* weights = nullptr;
  int64_t cols = 0;
};

// Runs [start, stop) of features on which every row of a table is constant, outside of which every weight is 1.
// None where a table has no such runs.
struct Segments {
  const int64_t* bounds = nullptr;  // [2 * count]
  int64_t count = 0;
};

// Positions [T] in somebody else's memory.
struct Indices {
  const int64_t* data = nullptr;
};

// Where a kernel is launched. The CPU has no streams.
struct Stream {
  int device = 0;
  void* handle = nullptr;
};

}  // namespace gradroute
