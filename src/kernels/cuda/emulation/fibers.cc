#include <cuda_runtime.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/philox.h"

namespace zipcache::cuda::emulation {

Index thread_index, block_index;

namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kLanes = 32;
constexpr int kLostRounds =
    100'000;  // rounds of all fibers without an event: they wait for nothing

struct Warp {
  // Two generations: a lane can be one collective ahead of the others.
  alignas(16) std::array<std::array<std::byte, kLanes * kLaneBytes>, 2> data{};
  std::array<Operation, 2> operation{};
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<std::byte[]> stack;
  unsigned thread = 0;
  bool done = false;
};

// The block that runs. Single-threaded: one launch at a time in the process.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::uint8_t> shared;
  std::uint8_t* shared_begin = nullptr;
  int at_barrier = 0;
  unsigned barrier_generation = 0;
  std::array<bool, 2> barrier_any{};  // of the generation at hand and of the one before
  long events = 0;
  Fiber* running = nullptr;
  ucontext_t scheduler{};
  const std::function<void()>* body = nullptr;
  std::exception_ptr failure;
};
Block* block = nullptr;

void fiber_main() {
  try {
    (*block->body)();
  } catch (...) {
    block->failure = std::current_exception();
  }
  block->running->done = true;
  ++block->events;
  swapcontext(&block->running->context, &block->scheduler);
}

void run_block(dim3 grid_index, unsigned n_threads, std::size_t shared_bytes,
               const std::function<void()>& body, Philox& random) {
  block->shared.assign(shared_bytes + 128, 0xcd);
  const auto address = reinterpret_cast<std::uintptr_t>(block->shared.data());
  block->shared_begin = block->shared.data() + (128 - address % 128) % 128;
  block->warps.assign((n_threads + kLanes - 1) / kLanes, {});
  block->at_barrier = 0;
  block->body = &body;
  block->fibers.resize(n_threads);
  for (unsigned thread = 0; thread < n_threads; ++thread) {
    Fiber& fiber = block->fibers[thread];
    if (fiber.stack == nullptr) {
      fiber.stack = std::make_unique<std::byte[]>(kStackBytes);
    }
    fiber.thread = thread;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  std::vector<unsigned> order(n_threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned at = n_threads - 1; at > 0; --at) {
    std::swap(order[at], order[random.below(at + 1)]);
  }

  // One warp stands still until the others can do nothing without it; then another one.
  const unsigned n_warps = static_cast<unsigned>(block->warps.size());
  unsigned still = random.below(n_warps + 1);
  unsigned n_done = 0;
  long last_events = -1;
  int quiet_rounds = 0;
  while (n_done < n_threads) {
    for (const unsigned thread : order) {
      Fiber& fiber = block->fibers[thread];
      if (fiber.done || thread / kLanes == still) {
        continue;
      }
      block->running = &fiber;
      thread_index = {thread, 0, 0};
      block_index = {grid_index.x, grid_index.y, grid_index.z};
      swapcontext(&block->scheduler, &fiber.context);
      if (block->failure) {
        std::rethrow_exception(block->failure);
      }
      n_done += fiber.done ? 1 : 0;
    }
    quiet_rounds = block->events == last_events ? quiet_rounds + 1 : 0;
    if (quiet_rounds > 0) {
      still = random.below(n_warps + 1);
    }
    last_events = block->events;
    if (quiet_rounds > kLostRounds) {
      throw std::runtime_error("emulation: threads wait for something that never happens");
    }
  }
}

}  // namespace

std::uint8_t* shared_memory() { return block->shared_begin; }

void yield() { swapcontext(&block->running->context, &block->scheduler); }

bool block_barrier(bool predicate) {
  const unsigned generation = block->barrier_generation;
  bool& any = block->barrier_any[generation % 2];
  any |= predicate;
  if (++block->at_barrier == static_cast<int>(block->fibers.size())) {
    block->at_barrier = 0;
    block->barrier_any[(generation + 1) % 2] = false;  // its readers have all come here
    ++block->barrier_generation;
    ++block->events;
  }
  while (block->barrier_generation == generation) {
    yield();
  }
  return any;
}

const std::byte* exchange(Operation operation, const void* data, std::size_t bytes) {
  const unsigned thread = block->running->thread;
  Warp& warp = block->warps[thread / kLanes];
  const unsigned generation = warp.generation;
  auto& buffer = warp.data[generation % 2];
  if (warp.arrived == 0) {
    warp.operation[generation % 2] = operation;
  } else if (warp.operation[generation % 2] != operation) {
    throw std::runtime_error("emulation: lanes of a warp meet in different operations");
  }
  if (bytes > 0) {
    std::memcpy(&buffer[thread % kLanes * kLaneBytes], data, bytes);
  }
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.generation;
    ++block->events;
  }
  while (warp.generation == generation) {
    yield();
  }
  return buffer.data();
}

void run(dim3 grid, dim3 threads, std::size_t shared_bytes, const std::function<void()>& body) {
  static Philox random(2024, 0, 0);
  Block storage;
  block = &storage;
  std::vector<dim3> blocks;
  for (unsigned n = 0; n < grid.x * grid.y * grid.z; ++n) {
    blocks.emplace_back(n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y);
  }
  for (std::size_t at = blocks.size() - 1; at > 0 && at < blocks.size(); --at) {
    std::swap(blocks[at], blocks[random.below(static_cast<std::uint32_t>(at + 1))]);
  }
  for (const dim3& index : blocks) {
    run_block(index, threads.x, shared_bytes, body, random);
  }
  block = nullptr;
}

}  // namespace zipcache::cuda::emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = __CUDA_ARCH__ / 100;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 6;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 << 10;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1 << 10;
      break;
  }
  return cudaSuccess;
}
cudaError_t zc_cuda_malloc(void** p, std::size_t bytes) {
  *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *p != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
