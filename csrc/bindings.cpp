// The module gradroute._native: a submodule per implementation, each with every kernel of kernels.inc.
#include <pybind11/pybind11.h>

#include "build.h"
#include "casters.h"
#include "ops.h"

namespace gradroute {
namespace {

// Binds a kernel as name(operands, stream), both of them tuples.
template <class Operands>
void bind(py::module_& ops, const char* name, void (*kernel)(const Operands&, const Stream&)) {
  ops.def(name, [kernel](py::handle operands, py::handle stream) {
    Reader reader;
    Operands p;
    Stream where;
    reader.read(operands, p);
    reader.read(stream, where);
    const py::gil_scoped_release released;
    kernel(p, where);
  });
}

void define_baseline(py::module_ ops) {
#define KERNEL(name, Operands) bind<Operands>(ops, #name, &cpu_baseline::name);
#ifdef GRADROUTE_EMULATED_CUDA  // tests/emulated_cuda.py has CUDA's kernels in the place of the CPU's
#define CUDA_KERNEL KERNEL
#endif
#include "kernels.inc"
}

#ifdef GRADROUTE_X86
void define_avx2(py::module_ ops) {
#define KERNEL(name, Operands) bind<Operands>(ops, #name, &cpu_avx2::name);
#include "kernels.inc"
}

void define_avx512(py::module_ ops) {
#define KERNEL(name, Operands) bind<Operands>(ops, #name, &cpu_avx512::name);
#include "kernels.inc"
}
#endif

#ifdef GRADROUTE_CUDA
void define_cuda(py::module_ ops) {
#define KERNEL(name, Operands) bind<Operands>(ops, #name, &cuda::name);
#define CUDA_KERNEL KERNEL
#include "kernels.inc"
}
#endif

// The names of each struct's fields, in order.
py::dict structs() {
  py::dict found;
#define STRUCT(Name)                                                            \
  {                                                                             \
    Name fields;                                                                \
    py::list names;                                                             \
    visit_fields(fields, [&](const char* name, auto&) { names.append(name); }); \
    found[#Name] = py::tuple(names);                                            \
  }
#define FIELD(Type, name)
#define END
#include "kernels.inc"
  return found;
}

// The struct that each kernel takes.
py::dict kernels() {
  py::dict found;
#define KERNEL(name, Operands) found[#name] = #Operands;
#define CUDA_KERNEL KERNEL
#include "kernels.inc"
  return found;
}

}  // namespace
}  // namespace gradroute

namespace py = pybind11;

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  using namespace gradroute;
  module.attr("TOKENS_PER_SUM") = TOKENS_PER_SUM;
  module.attr("BUILD") = GRADROUTE_BUILD;  // JSON: compilers, architectures
  module.attr("STRUCTS") = structs();
  module.attr("KERNELS") = kernels();
  py::list instruction_sets;  // the CPU's instruction sets that this machine runs, best first
#ifdef GRADROUTE_X86
  define_avx512(module.def_submodule("cpu_avx512"));
  define_avx2(module.def_submodule("cpu_avx2"));
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    instruction_sets.append("avx512");
  if (avx2) instruction_sets.append("avx2");
#endif
  define_baseline(module.def_submodule("cpu_baseline"));
  instruction_sets.append("baseline");
  module.attr("INSTRUCTION_SETS") = py::tuple(instruction_sets);
#ifdef GRADROUTE_CUDA
  define_cuda(module.def_submodule("cuda"));
#endif
}
