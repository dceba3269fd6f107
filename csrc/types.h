// The structs that Python hands over: addresses with shapes and strides, no tensors. Python checks devices, memory and
// alignment (gradroute/backends/native), and the public functions check shapes and dtypes; the kernels check nothing
// again.
#pragma once

#include <cstdint>

namespace gradroute {

enum class Dtype : int { float32, bfloat16, float16, float64 };

enum class Activation : int { silu, gelu, gelu_tanh, gelu_fast, relu, relu2 };

// Forwards with their rounding: gelu_new is gelu_tanh with that of several operations.
enum class ForwardActivation : int { silu, gelu, gelu_tanh, gelu_new, gelu_fast, relu, relu2 };

// What a block of a parameter [N, M] is: a row, a column, or all of it.
enum class Blocks : int { rows, columns, one };

// One number per dimension of a tensor of attention.
using Sizes = int64_t[4];

// Positions [T] in memory that a tensor owns.
using Indices = const int64_t*;

// Masks that are applied one after the other, absent ones last. CUDA kernels take them by value, in a fixed number.
constexpr int MOST_MASKS = 4;
template <class Element>
using UpToMost = Element[MOST_MASKS];

// Runs [start, stop) of features on which every row of a table is constant, and outside of which every weight is 1.
// A table without such runs has a count of 0.
struct Segments {
  const int64_t* bounds = nullptr;  // [2 * count]
  int64_t count = 0;
};

// Structs of which there may be any number, in memory that the caller owns.
template <class Element>
struct List {
  const Element* data = nullptr;
  int64_t count = 0;

  const Element* begin() const { return data; }
  const Element* end() const { return data + count; }
};

// clang-format off
#define STRUCT(Name) struct Name {
#define FIELD(Type, name) Type name{};
#define END };
// clang-format on
#include "kernels.inc"

}  // namespace gradroute
