// How Python's tuples become the structs of types.h. A tuple has a struct's fields in their order, and None stands for
// what is absent. gradroute/backends/native/operands.py makes the tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <iterator>
#include <list>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "types.h"

namespace gradroute {
namespace {

namespace py = pybind11;

// Calls visit(name, field) for each field of a struct.
#define STRUCT(Name)     \
  template <class Visit> \
  void visit_fields(Name& fields, const Visit& visit) {
#define FIELD(Type, name) visit(#name, fields.name);
#define END }
#include "kernels.inc"

// Fills structs from tuples, and owns what they point to beside tensors' memory.
class Reader {
 public:
  template <class T>
  void read(py::handle from, T& to) {
    if constexpr (std::is_pointer_v<T>)
      to = reinterpret_cast<T>(from.cast<uintptr_t>());
    else if constexpr (std::is_enum_v<T>)
      to = T(from.cast<int>());
    else if constexpr (std::is_arithmetic_v<T>)
      to = from.cast<T>();
    else if (!from.is_none())
      read_struct(from, to);
  }

  // At most N structs without the absent ones, which so come last.
  template <class T, size_t N>
  void read(py::handle from, T (&to)[N]) {
    size_t next = 0;
    for (py::handle one : from) {
      if (one.is_none()) continue;
      if (next == N)
        throw py::value_error("native kernels: got " + py::repr(from).cast<std::string>() + ", expected at most " +
                              std::to_string(N));
      read(one, to[next++]);
    }
  }

  // Any number of structs.
  template <class T>
  void read(py::handle from, List<T>& to) {
    const auto made = std::make_shared<std::vector<T>>();
    for (py::handle one : from) read(one, made->emplace_back());
    lists.push_back(made);
    to = {made->data(), int64_t(made->size())};
  }

  void read(py::handle from, Sizes& to) {
    for (size_t i = 0; i < 4; ++i) to[i] = from[py::int_(i)].cast<int64_t>();
  }

  void read(py::handle from, Activation& to) {
    to = Activation(place_of(from, {"silu", "gelu", "gelu_tanh", "gelu_fast", "relu", "relu2"}));
  }

  void read(py::handle from, ForwardActivation& to) {
    to = ForwardActivation(place_of(from, {"silu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "relu", "relu2"}));
  }

  // A sequence of integers, start and stop of each segment in turn.
  void read(py::handle from, Segments& to) {
    std::vector<int64_t>& bounds = segments.emplace_back();
    for (py::handle bound : from) bounds.push_back(bound.cast<int64_t>());
    to = {bounds.data(), int64_t(bounds.size()) / 2};
  }

 private:
  // Where a string stands in a list of them, and so in the enumeration that lists the same names.
  template <size_t N>
  static size_t place_of(py::handle from, const char* const (&names)[N]) {
    const auto name = from.cast<std::string>();
    std::string listed;
    for (size_t i = 0; i < N; ++i) {
      if (name == names[i]) return i;
      listed += (i == 0 ? "" : i + 1 < N ? ", " : " or ") + std::string(names[i]);
    }
    throw py::value_error("native kernels: got activation " + name + ", expected " + listed);
  }

  template <class Struct>
  void read_struct(py::handle from, Struct& to) {
    const auto tuple = py::reinterpret_borrow<py::tuple>(from);
    size_t expected = 0, next = 0;
    visit_fields(to, [&](const char*, auto&) { ++expected; });
    if (!py::isinstance<py::tuple>(from) || tuple.size() != expected)
      throw py::type_error("native kernels: got " + py::repr(from).cast<std::string>() + ", expected a tuple of " +
                           std::to_string(expected) + " fields");
    visit_fields(to, [&](const char*, auto& field) { read(tuple[next++], field); });
  }

  std::list<std::vector<int64_t>> segments;
  std::vector<std::shared_ptr<void>> lists;
};

}  // namespace
}  // namespace gradroute
