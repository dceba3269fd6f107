// How Python's tuples become the types of types.h; None is absent. gradroute/native.py makes the tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "types.h"

namespace pybind11::detail {

template <class T>
T* pointer(handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

// A caster from a tuple to T, whose `fill` reads it.
#define GRADROUTE_CASTER(T, NAME)                   \
  template <>                                       \
  struct type_caster<T> {                           \
    PYBIND11_TYPE_CASTER(T, const_name(NAME));      \
    bool load(handle source, bool) {                \
      if (source.is_none()) return true;            \
      if (!isinstance<tuple>(source)) return false; \
      fill(reinterpret_borrow<tuple>(source));      \
      return true;                                  \
    }                                               \
    void fill(const tuple& t);                      \
  }

GRADROUTE_CASTER(gradroute::Matrix, "Matrix");
GRADROUTE_CASTER(gradroute::Heads, "Heads");
GRADROUTE_CASTER(gradroute::Routing, "Routing");
GRADROUTE_CASTER(gradroute::Table, "Table");
GRADROUTE_CASTER(gradroute::Stream, "Stream");
#undef GRADROUTE_CASTER

// (address, rows, cols, row stride, column stride, dtype)
inline void type_caster<gradroute::Matrix>::fill(const tuple& t) {
  value.data = pointer<void>(t[0]);
  value.rows = t[1].cast<int64_t>();
  value.cols = t[2].cast<int64_t>();
  value.row_stride = t[3].cast<int64_t>();
  value.col_stride = t[4].cast<int64_t>();
  value.dtype = gradroute::Dtype(t[5].cast<int>());
}

// (address, shape, strides, dtype)
inline void type_caster<gradroute::Heads>::fill(const tuple& t) {
  value.data = pointer<void>(t[0]);
  for (size_t i = 0; i < 4; ++i) {
    value.shape[i] = t[1][int_(i)].cast<int64_t>();
    value.strides[i] = t[2][int_(i)].cast<int64_t>();
  }
  value.dtype = gradroute::Dtype(t[3].cast<int>());
}

// (address of the ids, address of the strength, its stride, whether it is double)
inline void type_caster<gradroute::Routing>::fill(const tuple& t) {
  value.ids = pointer<const int32_t>(t[0]);
  value.strength = pointer<const void>(t[1]);
  value.strength_stride = t[2].cast<int64_t>();
  value.strength_is_double = t[3].cast<bool>();
}

// (address, columns)
inline void type_caster<gradroute::Table>::fill(const tuple& t) {
  value.weights = pointer<const float>(t[0]);
  value.cols = t[1].cast<int64_t>();
}

// (device, handle)
inline void type_caster<gradroute::Stream>::fill(const tuple& t) {
  value.device = t[0].cast<int>();
  value.handle = pointer<void>(t[1]);
}

// The address of int64.
template <>
struct type_caster<gradroute::Indices> {
  PYBIND11_TYPE_CASTER(gradroute::Indices, const_name("Indices"));
  bool load(handle source, bool) {
    value.data = pointer<const int64_t>(source);
    return true;
  }
};

// Its name.
template <>
struct type_caster<gradroute::Activation> {
  PYBIND11_TYPE_CASTER(gradroute::Activation, const_name("Activation"));
  bool load(handle source, bool) {
    static const char* const names[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2"};
    const auto name = source.cast<std::string>();
    for (int i = 0; i < 5; ++i) {
      if (name != names[i]) continue;
      value = gradroute::Activation(i);
      return true;
    }
    return false;
  }
};

// A sequence of integers, start and stop of each segment in turn.
template <>
struct type_caster<gradroute::Segments> {
  PYBIND11_TYPE_CASTER(gradroute::Segments, const_name("Segments"));
  std::vector<int64_t> bounds;
  bool load(handle source, bool) {
    if (!isinstance<sequence>(source)) return false;
    for (handle bound : reinterpret_borrow<sequence>(source)) bounds.push_back(bound.cast<int64_t>());
    value.bounds = bounds.data();
    value.count = int64_t(bounds.size()) / 2;
    return true;
  }
};

}  // namespace pybind11::detail
