// Our work inside the host's graphs. A node that touches a KV cache is replaced, in our own list of
// nodes, by one or several nodes of ggml's CUSTOM operation; each runs a Step. ggml's threads call
// all steps in the order of the list with a barrier after each.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/expected.h"
#include "cache/attention.h"
#include "cache/visibility.h"
#include "ggml/host.h"
#include "kernels/kernels.h"

struct ggml_tensor;

namespace zipcache::ggml {

// The visibilities of the graph being computed: all layers that share a mask share one. A mask is
// known by its tensor, not by its address, which the host may use again within a graph.
class VisibilityPool {
 public:
  // `mask` may be nullptr (all is visible); `stream` is counted from the first of the attention.
  const cache::Visibility* get(const ggml_tensor* mask, std::uint32_t stream, std::uint32_t n_rows,
                               std::uint32_t n_cells);
  void start_graph() { used_ = 0; }

 private:
  struct Entry {
    const ggml_tensor* mask = nullptr;
    std::uint32_t plane = 0;
    cache::Visibility visibility;
  };
  std::vector<std::unique_ptr<Entry>> entries_;  // the first used_ belong to this graph
  std::size_t used_ = 0;
};

// What the steps of one backend share.
class StepContext {
 public:
  StepContext(const kernels::KernelTable* kernels, std::uint64_t id) : attention(kernels), id(id) {}

  cache::Attention attention;
  VisibilityPool visibilities;
  const std::uint64_t id;  // of this backend, never 0 and never used again

  void start_graph();
  // The first failure of a graph wins; steps after it do nothing.
  void fail(Error error);
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  std::optional<Error> take_error();

 private:
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::optional<Error> error_;
};

class Step {
 public:
  enum class Threads : std::uint8_t { kOne, kAll };

  Step(StepContext* context, Threads threads) : context_(context), threads_(threads) {}
  virtual ~Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  virtual Status run(std::uint32_t ith, std::uint32_t n_threads) = 0;

  StepContext& context() { return *context_; }
  Threads threads() const { return threads_; }

 private:
  StepContext* const context_;
  const Threads threads_;
};

// A node that runs `step` in the place of `original`.
ggml_tensor custom_node(const ggml_tensor* original, Step* step);

}  // namespace zipcache::ggml
