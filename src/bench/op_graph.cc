#include "bench/op_graph.h"

#include "base/check.h"
#include "bench/peaks.h"

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

ggml_tensor* OpGraph::custom(ggml_custom_op_t function, int n_tasks) {
  return ggml_custom_4d(context_.get(), GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, function, n_tasks,
                        this);
}

// Nodes are computed in this order, with a barrier after each.
void OpGraph::finish(ggml_tensor* output) {
  ggml_tensor* nodes[] = {custom(flush, GGML_N_TASKS_MAX), custom(start, 1), output,
                          custom(stop, 1)};
  buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()));
  ZC_CHECK(buffer_ != nullptr);
  for (ggml_tensor* node : nodes) {
    ggml_build_forward_expand(graph_, node);
  }
}

void OpGraph::flush(ggml_tensor* /*node*/, int ith, int n_threads, void* self) {
  if (static_cast<OpGraph*>(self)->flushes_caches_) {
    flush_caches(static_cast<std::uint32_t>(ith), static_cast<std::uint32_t>(n_threads));
  }
}
void OpGraph::start(ggml_tensor* /*node*/, int ith, int /*n_threads*/, void* self) {
  if (ith == 0) {
    static_cast<OpGraph*>(self)->start_ = Clock::now();
  }
}
void OpGraph::stop(ggml_tensor* /*node*/, int ith, int /*n_threads*/, void* self) {
  if (ith == 0) {
    static_cast<OpGraph*>(self)->stop_ = Clock::now();
  }
}

double OpGraph::compute(std::uint32_t n_threads, bool flushes_caches) {
  flushes_caches_ = flushes_caches;
  ggml_backend_reg_t registry =
      ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_.get()));
  const auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
  set_n_threads(backend_.get(), static_cast<int>(n_threads));
  ZC_CHECK(ggml_backend_graph_compute(backend_.get(), graph_) == GGML_STATUS_SUCCESS);
  return std::chrono::duration<double>(stop_ - start_).count();
}

}  // namespace zipcache::bench
