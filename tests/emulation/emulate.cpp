// Emulates blocks of threads as fibers of one thread of the CPU; cuda_runtime.h says how.
#include <ucontext.h>

#include <array>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 512;  // the largest launch bounds of the kernels
constexpr unsigned MAX_GRID_YZ = 65535;
constexpr size_t MAX_SHARED = 48 * 1024;  // the shared memory of a block that asks for no more
constexpr size_t STACK = 128 * 1024;      // a fiber's
constexpr uint32_t POISON = 0x7FFFFFFF;   // NaN, and the largest integer

enum class State { ready, at_barrier, at_exchange, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
  dim3 index;
  unsigned exchanges;  // how many it took part in
};

// The values of a warp's lanes, twice: a lane may begin the next exchange before others have read this one.
struct Mailbox {
  char values[2][WARP * sizeof(float4)];
};

struct Memory {
  void* data;
  size_t bytes;
};

std::mutex mutex;  // held by the launch that uses the variables below
std::vector<Fiber> fibers;
std::array<Mailbox, MAX_THREADS / WARP> mailboxes;
std::vector<Memory> static_memory;
std::vector<float4> dynamic_memory;
std::mt19937 generator;  // draws the orders of threads, from launch to launch, alike in every process
const std::function<void()>* body;
ucontext_t scheduler;
unsigned current;  // the fiber that runs
std::string failure;

void poison(void* data, size_t bytes) {
  char* to = static_cast<char*>(data);
  for (size_t i = 0; i < bytes; i += sizeof(POISON)) memcpy(to + i, &POISON, std::min(sizeof(POISON), bytes - i));
}

// Returns to the scheduler, until it finds that the fiber may go on.
void wait(State state) {
  const unsigned self = current;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
}

void enter() {
  (*body)();
  wait(State::done);
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.state = State::ready;
  fiber.index = dim3(thread % blockDim.x, thread / blockDim.x);
  fiber.exchanges = 0;
}

void resume(unsigned thread) {
  current = thread;
  threadIdx = fibers[thread].index;
  swapcontext(&scheduler, &fibers[thread].context);
  if (!failure.empty()) throw std::runtime_error("emulated CUDA: " + failure);
}

// How many of the threads [begin, end) are in a state.
unsigned count(State state, unsigned begin, unsigned end) {
  unsigned found = 0;
  for (unsigned i = begin; i < end; ++i) found += fibers[i].state == state;
  return found;
}

void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::ready;
}

// Releases the warps whose lanes all wait for an exchange, and the block when all its threads wait at a barrier.
void release_complete(unsigned threads) {
  bool released = false;
  for (unsigned warp = 0; warp < threads; warp += WARP) {
    if (count(State::at_exchange, warp, warp + WARP) < WARP) continue;
    release(warp, warp + WARP);
    released = true;
  }
  if (released) return;
  if (count(State::at_barrier, 0, threads) < threads)
    throw std::runtime_error("emulated CUDA: deadlock: a barrier or a warp's operation that not all threads reach");
  release(0, threads);
}

void run_block(unsigned threads) {
  for (const Memory& memory : static_memory) poison(memory.data, memory.bytes);
  poison(dynamic_memory.data(), dynamic_memory.size() * sizeof(float4));
  for (unsigned i = 0; i < threads; ++i) start(i);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), generator);
  for (;;) {
    for (unsigned i : order)
      if (fibers[i].state == State::ready) resume(i);
    if (count(State::done, 0, threads) == threads) return;
    release_complete(threads);
  }
}

void check(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("emulated CUDA: ") + what);
}

}  // namespace

namespace emulation {

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(mutex);
  const unsigned threads = config.blockDim.x * config.blockDim.y;
  const dim3& grid = config.gridDim;
  check(grid.x > 0 && grid.y > 0 && grid.z > 0, "an empty grid");
  check(grid.y <= MAX_GRID_YZ && grid.z <= MAX_GRID_YZ, "a grid beyond the limits of a launch");
  check(config.blockDim.z == 1 && threads > 0 && threads <= MAX_THREADS, "a block beyond the kernels' launch bounds");
  check(threads % WARP == 0, "a block that is not whole warps");
  check(config.dynamicSmemBytes <= MAX_SHARED, "more shared memory than a block has without asking");
  body = &thread;
  gridDim = grid;
  blockDim = config.blockDim;
  failure.clear();
  if (fibers.size() < threads) fibers.resize(threads);
  dynamic_memory.resize((config.dynamicSmemBytes + sizeof(float4) - 1) / sizeof(float4));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
}

void fail(const char* what, const char* where, unsigned line) {
  failure = std::string(what) + (line > 0 ? std::string(", ") + where + ":" + std::to_string(line) : "");
  wait(State::done);
  __builtin_unreachable();  // the scheduler throws
}

void wait_for_block() { wait(State::at_barrier); }

unsigned lane() { return current % WARP; }

void exchange(const void* value, void* values, size_t bytes) {
  if (bytes > sizeof(float4)) fail("an exchange of more than 16 bytes");
  char* const mail = mailboxes[current / WARP].values[fibers[current].exchanges++ % 2];
  memcpy(mail + lane() * bytes, value, bytes);
  wait(State::at_exchange);
  memcpy(values, mail, WARP * bytes);
}

void* dynamic_shared_memory() { return dynamic_memory.data(); }

void add_shared_memory(void* memory, size_t bytes) {
  static_memory.push_back({memory, bytes});
  poison(memory, bytes);
}

}  // namespace emulation

// The functions that g++ -fsanitize=alignment,bounds calls, in place of its library's, which would end the process.
// Everything that it hands over begins with the place in the source.

namespace {

struct Place {
  const char* file;
  uint32_t line, column;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(const Place* place, uintptr_t) {
  emulation::fail("a misaligned address", place->file, place->line);
}

extern "C" void __ubsan_handle_out_of_bounds(const Place* place, uintptr_t) {
  emulation::fail("an index outside of an array", place->file, place->line);
}
