// A ggml graph on the host's CPU backend: both sides of a comparison run in its thread pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "ggml-backend.h"
#include "ggml.h"

namespace zipcache::bench {

class OpGraph {
 public:
  OpGraph();

  // For making tensors. allocate() gives them memory, once.
  ggml_context* context() { return context_.get(); }
  void allocate();
  // Appends the tensors that `output` needs, then computes all of them each time.
  void expand(ggml_tensor* output);
  void compute(std::uint32_t n_threads);

 private:
  struct Free {
    void operator()(ggml_context* context) const { ggml_free(context); }
    void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
    void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
  };
  std::unique_ptr<ggml_backend, Free> backend_;
  std::unique_ptr<ggml_context, Free> context_;
  std::unique_ptr<ggml_backend_buffer, Free> buffer_;
  ggml_cgraph* graph_ = nullptr;
};

}  // namespace zipcache::bench
