#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
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
  unsigned cluster_barrier = 0;  // generation at which it arrived
  bool done = false;
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::vector<unsigned> order;  // in which they take turns
  std::vector<Warp> warps;
  std::vector<std::uint8_t> shared;
  std::uint8_t* shared_begin = nullptr;
  int at_barrier = 0;
  unsigned barrier_generation = 0;
  std::array<bool, 2> barrier_any{};  // of the generation at hand and of the one before
  unsigned still = 0;                 // this warp does not run
  unsigned n_done = 0;
  long events = 0, last_events = -1;
  Fiber* running = nullptr;
};

// The blocks that run. Single-threaded: one launch at a time in the process.
struct Cluster {
  std::vector<Block> blocks;
  unsigned at_barrier = 0;
  unsigned barrier_generation = 0;
  ucontext_t scheduler{};
  const std::function<void()>* body = nullptr;
  std::exception_ptr failure;
};
Cluster* cluster = nullptr;
Block* block = nullptr;  // of the cluster, the one that runs

void fiber_main() {
  try {
    (*cluster->body)();
  } catch (...) {
    cluster->failure = std::current_exception();
  }
  block->running->done = true;
  ++block->events;
  swapcontext(&block->running->context, &cluster->scheduler);
}

void start_block(Block& b, dim3 index, unsigned n_threads, std::size_t shared_bytes,
                 Philox& random) {
  b.index = index;
  b.shared.assign(shared_bytes + 128, 0xcd);
  const auto address = reinterpret_cast<std::uintptr_t>(b.shared.data());
  b.shared_begin = b.shared.data() + (128 - address % 128) % 128;
  b.warps.assign((n_threads + kLanes - 1) / kLanes, {});
  b.at_barrier = 0;
  b.n_done = 0;
  b.last_events = -1;
  b.fibers.resize(n_threads);
  for (unsigned thread = 0; thread < n_threads; ++thread) {
    Fiber& fiber = b.fibers[thread];
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
  b.order.resize(n_threads);
  std::iota(b.order.begin(), b.order.end(), 0u);
  for (unsigned at = n_threads - 1; at > 0; --at) {
    std::swap(b.order[at], b.order[random.below(at + 1)]);
  }
  b.still = random.below(static_cast<unsigned>(b.warps.size()) + 1);
}

// A turn for every fiber. One warp stands still until the others can do nothing without it; then
// another one. False: nothing happened.
bool run_round(Block& b, Philox& random) {
  block = &b;
  block_index = {b.index.x, b.index.y, b.index.z};
  for (const unsigned thread : b.order) {
    Fiber& fiber = b.fibers[thread];
    if (fiber.done || thread / kLanes == b.still) {
      continue;
    }
    b.running = &fiber;
    thread_index = {thread, 0, 0};
    swapcontext(&cluster->scheduler, &fiber.context);
    if (cluster->failure) {
      std::rethrow_exception(cluster->failure);
    }
    b.n_done += fiber.done ? 1 : 0;
  }
  const bool quiet = b.events == b.last_events;
  if (quiet) {
    b.still = random.below(static_cast<unsigned>(b.warps.size()) + 1);
  }
  b.last_events = b.events;
  return !quiet;
}

void run_cluster(unsigned n_threads, Philox& random) {
  const auto is_done = [&](const Block& b) { return b.n_done == n_threads; };
  int quiet_rounds = 0;
  while (!std::ranges::all_of(cluster->blocks, is_done)) {
    bool quiet = true;
    for (Block& b : cluster->blocks) {
      if (!is_done(b) && run_round(b, random)) {
        quiet = false;
      }
    }
    quiet_rounds = quiet ? quiet_rounds + 1 : 0;
    if (quiet_rounds > kLostRounds) {
      throw std::runtime_error("emulation: threads wait for something that never happens");
    }
  }
}

}  // namespace

std::uint8_t* shared_memory() { return block->shared_begin; }
std::uint8_t* shared_memory_of(int rank) {
  Block& other = cluster->blocks.at(static_cast<std::size_t>(rank));
  if (other.n_done > 0) {
    throw std::runtime_error("emulation: shared memory of a block that has ended");
  }
  return other.shared_begin;
}
int cluster_rank() { return static_cast<int>(block - cluster->blocks.data()); }

void yield() { swapcontext(&block->running->context, &cluster->scheduler); }

void cluster_arrive() {
  block->running->cluster_barrier = cluster->barrier_generation;
  if (++cluster->at_barrier == cluster->blocks.size() * block->fibers.size()) {
    cluster->at_barrier = 0;
    ++cluster->barrier_generation;
    for (Block& b : cluster->blocks) {
      ++b.events;
    }
  }
}
void cluster_wait() {
  while (cluster->barrier_generation == block->running->cluster_barrier) {
    yield();
  }
}

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

void run(dim3 grid, dim3 threads, unsigned cluster_blocks, std::size_t shared_bytes,
         const std::function<void()>& body) {
  static Philox random(2024, 0, 0);
  if (cluster_blocks == 0 || grid.x % cluster_blocks != 0) {
    throw std::runtime_error("emulation: blocks that do not fill clusters");
  }
  Cluster storage;
  storage.blocks.resize(cluster_blocks);
  storage.body = &body;
  cluster = &storage;
  std::vector<dim3> firsts;  // blocks of the clusters
  for (unsigned n = 0; n < grid.x * grid.y * grid.z; n += cluster_blocks) {
    firsts.emplace_back(n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y);
  }
  for (std::size_t at = firsts.size() - 1; at > 0 && at < firsts.size(); --at) {
    std::swap(firsts[at], firsts[random.below(static_cast<std::uint32_t>(at + 1))]);
  }
  for (const dim3& first : firsts) {
    for (unsigned rank = 0; rank < cluster_blocks; ++rank) {
      start_block(storage.blocks[rank], dim3(first.x + rank, first.y, first.z), threads.x,
                  shared_bytes, random);
    }
    run_cluster(threads.x, random);
  }
  block = nullptr;
  cluster = nullptr;
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
