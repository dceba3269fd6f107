// The module gradroute._native: a submodule per implementation, one line a function.
#include <pybind11/pybind11.h>

#include "build.h"
#include "casters.h"
#include "ops.h"

namespace py = pybind11;

#define GRADROUTE_DEFINE(name) ops.def(#name, &name, py::call_guard<py::gil_scoped_release>())

#define GRADROUTE_DEFINE_OPS(space)        \
  namespace gradroute::space {             \
  void define(py::module_ ops) {           \
    GRADROUTE_DEFINE(masked_product);      \
    GRADROUTE_DEFINE(bias_grad);           \
    GRADROUTE_DEFINE(activation_backward); \
    GRADROUTE_DEFINE(glu_backward);        \
    GRADROUTE_DEFINE(norm_backward);       \
    GRADROUTE_DEFINE(embedding_backward);  \
    GRADROUTE_DEFINE(masked_heads);        \
    GRADROUTE_DEFINE(attention_delta);     \
    GRADROUTE_DEFINE(adamw_step);          \
  }                                        \
  }

GRADROUTE_DEFINE_OPS(cpu_baseline)
#ifdef GRADROUTE_X86
GRADROUTE_DEFINE_OPS(cpu_avx2)
GRADROUTE_DEFINE_OPS(cpu_avx512)
#endif
#ifdef GRADROUTE_CUDA
GRADROUTE_DEFINE_OPS(cuda)
#endif

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
  module.attr("TOKENS_PER_SUM") = gradroute::TOKENS_PER_SUM;
  module.attr("BUILD") = GRADROUTE_BUILD;  // JSON: compilers, architectures
  // The CPU's instruction sets, best first, that this machine runs.
  py::list instruction_sets;
#ifdef GRADROUTE_X86
  gradroute::cpu_avx512::define(module.def_submodule("cpu_avx512"));
  gradroute::cpu_avx2::define(module.def_submodule("cpu_avx2"));
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    instruction_sets.append("avx512");
  if (avx2) instruction_sets.append("avx2");
#endif
  gradroute::cpu_baseline::define(module.def_submodule("cpu_baseline"));
  instruction_sets.append("baseline");
  module.attr("INSTRUCTION_SETS") = py::tuple(instruction_sets);
#ifdef GRADROUTE_CUDA
  gradroute::cuda::define(module.def_submodule("cuda"));
#endif
}
