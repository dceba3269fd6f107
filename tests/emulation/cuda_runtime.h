// The part of CUDA that csrc/*.cu use, on the CPU: tests/emulated_cuda.py compiles them with g++ against these headers.
//
// Emulated: grids, one block after the other; the threads of a block, as fibers that run in another random order in
// each block until they wait for each other; barriers, shuffles and ballots; shared memory, poisoned at the start of
// each block. A launch throws where a GPU would hang, fail or read garbage: a barrier or a warp's operation that not
// all its threads reach, a vector that is not aligned, an index outside of an array, limits of a launch.
//
// Not emulated: the device's expf, erff, tanhf and reciprocal (the CPU's arithmetic takes their place), fused
// multiply-adds; the memory model (a missing barrier shows only where the order of the threads makes a difference);
// several blocks at once, streams, registers, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

// Calls `thread` as every thread of a grid. Throws std::runtime_error.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

// Ends the launch from within a thread: `run` throws. Does not return.
[[noreturn]] void fail(const char* what, const char* where = "", unsigned line = 0);

void wait_for_block();

unsigned lane();

// Hands over one value of each lane of a warp: `values` [32].
void exchange(const void* value, void* values, size_t bytes);

template <class T>
T from_lane(const T& value, unsigned other) {
  T values[32];
  exchange(&value, values, sizeof(T));
  return values[other % 32];
}

void* dynamic_shared_memory();

// Memory to be poisoned at the start of each block.
void add_shared_memory(void* memory, size_t bytes);

// A `__shared__` variable: blocks run one after the other, so one is enough.
template <class T>
struct Shared {
  alignas(16) T value;
  Shared() { add_shared_memory(&value, sizeof(value)); }
};

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Parameters&... arguments) {
  emulation::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { emulation::wait_for_block(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_lane(value, lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulation::from_lane(value, emulation::lane() ^ distance);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  bool votes[32];
  emulation::exchange(&vote, votes, sizeof(vote));
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(votes[lane]) << lane;
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
void __stwb(T* address, T value) {
  *address = value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

using std::max;
using std::min;
