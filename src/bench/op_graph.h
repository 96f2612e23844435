// A ggml graph on the host's CPU backend: both sides of a comparison run in its thread pool.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "ggml-backend.h"
#include "ggml.h"

namespace zipcache::bench {

class OpGraph {
 public:
  OpGraph();

  // For making tensors.
  ggml_context* context() { return context_.get(); }
  // Gives the tensors memory; from now on the graph computes what `output` needs. Once.
  void finish(ggml_tensor* output);
  // Returns the seconds that it took, measured between two nodes of the graph: with its threads
  // awake, as in the middle of a model, and, if asked for, nothing in the processor's caches.
  double compute(std::uint32_t n_threads, bool flushes_caches);

 private:
  using Clock = std::chrono::steady_clock;
  static void flush(ggml_tensor* node, int ith, int n_threads, void* self);
  static void start(ggml_tensor* node, int ith, int n_threads, void* self);
  static void stop(ggml_tensor* node, int ith, int n_threads, void* self);
  ggml_tensor* custom(ggml_custom_op_t function, int n_tasks);

  struct Free {
    void operator()(ggml_context* context) const { ggml_free(context); }
    void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
    void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
  };
  std::unique_ptr<ggml_backend, Free> backend_;
  std::unique_ptr<ggml_context, Free> context_;
  std::unique_ptr<ggml_backend_buffer, Free> buffer_;
  ggml_cgraph* graph_ = nullptr;
  bool flushes_caches_ = false;
  Clock::time_point start_, stop_;
};

}  // namespace zipcache::bench
