# The CUDA kernels, where there is a compiler for them. The runtime is linked statically: the module loads without a
# driver, and beside any torch.
set(CUDA_VERSION_BUILT "")
set(CUDA_ARCHITECTURES_BUILT "")
if(NOT GRADROUTE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER AND GRADROUTE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "gradroute: GRADROUTE_CUDA=1, but no nvcc was found (set CUDACXX to its path, or CUDA_HOME)")
  endif()
endif()
