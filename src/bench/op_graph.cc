#include "bench/op_graph.h"

#include "base/check.h"

namespace zipcache::bench {
namespace {

constexpr std::size_t kMaxNodes = 64;

}  // namespace

OpGraph::OpGraph() {
  backend_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
  ZC_CHECK(backend_ != nullptr);
  context_.reset(ggml_init({.mem_size = kMaxNodes * ggml_tensor_overhead() +
                                        ggml_graph_overhead_custom(kMaxNodes, false),
                            .mem_buffer = nullptr,
                            .no_alloc = true}));
  ZC_CHECK(context_ != nullptr);
  graph_ = ggml_new_graph_custom(context_.get(), kMaxNodes, false);
}

void OpGraph::allocate() {
  buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()));
  ZC_CHECK(buffer_ != nullptr);
}

void OpGraph::expand(ggml_tensor* output) { ggml_build_forward_expand(graph_, output); }

void OpGraph::compute(std::uint32_t n_threads) {
  ggml_backend_reg_t registry =
      ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_.get()));
  const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
  set_n_threads(backend_.get(), static_cast<int>(n_threads));
  ZC_CHECK(ggml_backend_graph_compute(backend_.get(), graph_) == GGML_STATUS_SUCCESS);
}

}  // namespace zipcache::bench
