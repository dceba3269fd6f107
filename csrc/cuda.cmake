# The CUDA kernels, unless GRADROUTE_CUDA is OFF. The runtime is linked statically: the module loads without a
# driver, and beside any torch.
set(CUDA_VERSION_BUILT "")
set(CUDA_ARCHITECTURES_BUILT "")
if(GRADROUTE_CUDA STREQUAL "OFF")
  return()
endif()

option(GRADROUTE_PTXAS_VERBOSE "Have the assembler print each kernel's registers, spills and shared memory" OFF)

# CMake itself looks into CUDACXX and PATH only.
if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
  find_program(GRADROUTE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
  if(GRADROUTE_NVCC)
    set(ENV{CUDACXX} "${GRADROUTE_NVCC}")
  elseif(GRADROUTE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "gradroute: GRADROUTE_CUDA=1, but no nvcc was found (set CUDACXX to its path, or CUDA_HOME)")
  else()
    return()
  endif()
endif()

# Set before CMake would choose the oldest architecture that nvcc knows. The entry 100, without -real, is also kept as
# PTX, which newer chips compile for themselves.
set(ARCHITECTURES "$ENV{CMAKE_CUDA_ARCHITECTURES}")
if(ARCHITECTURES STREQUAL "")
  set(ARCHITECTURES 80-real 90a-real 100)
  execute_process(COMMAND "$ENV{CUDACXX}" --version OUTPUT_VARIABLE NVCC_SAYS ERROR_QUIET)
  if(NVCC_SAYS MATCHES "release ([0-9.]+)," AND CMAKE_MATCH_1 VERSION_LESS 12.8)  # which does not know 100
    set(ARCHITECTURES 80-real 90a-real 90)
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES "${ARCHITECTURES}" CACHE STRING "What the CUDA kernels are compiled for")

# An nvcc that fails is an error, even where kernels are optional: CMake's own message for it does not say what is wrong.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "gradroute: nvcc ($ENV{CUDACXX}) cannot compile: its toolkit is incomplete or the host compiler "
    "unknown to it, see the logs in ${CMAKE_BINARY_DIR}/CMakeFiles. GRADROUTE_CUDA=0 leaves out the CUDA kernels.")
endif()
message(STATUS "gradroute: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES} by ${CMAKE_CUDA_COMPILER}")
enable_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER_ID STREQUAL "NVIDIA" OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "gradroute: the CUDA kernels need nvcc 12.0 or newer, and 12.8 for architecture 100, but "
    "${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}. GRADROUTE_CUDA=0 leaves them out.")
endif()

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} *.cu)
target_sources(_native PRIVATE ${CUDA_SOURCES})
target_compile_definitions(_native PRIVATE GRADROUTE_CUDA)
target_compile_options(_native PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
if(GRADROUTE_PTXAS_VERBOSE)
  target_compile_options(_native PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xptxas -v>")
endif()
set_target_properties(
  _native PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                     CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
# Without this, the loader would bind the runtime's functions to those of a libcudart that torch has loaded.
target_link_options(_native PRIVATE "LINKER:--exclude-libs,ALL")

set(CUDA_VERSION_BUILT "${CMAKE_CUDA_COMPILER_VERSION}")
set(CUDA_ARCHITECTURES_BUILT "${CMAKE_CUDA_ARCHITECTURES}")
