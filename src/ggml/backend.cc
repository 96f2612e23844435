#include "ggml/backend.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml/attention_node.h"
#include "ggml/buffer.h"
#include "ggml/buffer_locks.h"
#include "ggml/guards.h"
#include "ggml/log.h"
#include "ggml/registry.h"
#include "ggml/shift_node.h"
#include "ggml/step.h"
#include "ggml/store_node.h"
#include "ggml/tables.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

class Backend {
 public:
  static constexpr const char* kName = kDeviceName;

  explicit Backend(std::uint64_t id)
      : cpu_(host()), rotating_cpu_(host()), steps_context_(&kernel_table(), id) {
    if (valid()) {
      rotating_cpu_.set_n_threads(1);
    }
  }

  bool valid() const { return cpu_.get() != nullptr && rotating_cpu_.get() != nullptr; }
  CpuBackend& cpu() { return cpu_; }

  ggml_status compute(const ggml_cgraph* graph) {
    rewrite(graph);
    if (refusal_) {
      return failed(*refusal_);
    }
    const BufferLocks<KvBuffer> locks(buffers_);
    for (KvBuffer* buffer : buffers_) {
      if (const auto error = buffer->take_error()) {
        return failed(*error);
      }
    }
    steps_context_.start_graph();
    ggml_cgraph ours = *graph;
    ours.nodes = nodes_.data();
    ours.n_nodes = static_cast<int>(nodes_.size());
    ours.uid = 0;
    const ggml_status status = ggml_backend_graph_compute(cpu_.get(), &ours);
    if (const auto error = steps_context_.take_error()) {
      return failed(*error);
    }
    return status;
  }

 private:
  // Makes nodes_ of the graph's. The host computes a graph many times under one uid.
  void rewrite(const ggml_cgraph* graph) {
    if (graph->uid != 0 && graph->uid == uid_) {
      return;
    }
    uid_ = 0;
    nodes_.clear();
    custom_.clear();
    steps_.clear();
    buffers_.clear();
    refusal_.reset();
    for (int i = 0; i < graph->n_nodes; ++i) {
      ggml_tensor* node = graph->nodes[i];
      if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || !take_over(node)) {
        nodes_.push_back(node);
      }
    }
    // One order for all backends, so that two that share two buffers can't wait for each other.
    std::sort(buffers_.begin(), buffers_.end());
    buffers_.erase(std::unique(buffers_.begin(), buffers_.end()), buffers_.end());
    uid_ = graph->uid;
  }

  // Adds the nodes that stand for `node`; false when the CPU backend shall compute it.
  bool take_over(const ggml_tensor* node) {
    const NodeClass found = classify(node, buffer_type());
    switch (found.kind) {
      case NodeKind::kOther:
      case NodeKind::kElsewhere:
        return false;
      case NodeKind::kRefused:
        refusal_ = unsupported(found.reason);
        return true;
      case NodeKind::kStore:
        if (use_store(kv_tensor(node))) {
          add(node, make_store_step(&steps_context_, node));
        }
        return true;
      case NodeKind::kAttend:
        if (use_store(kv_tensor(node->src[1]))) {
          for (auto& step : make_attention_steps(&steps_context_, node)) {
            add(node, std::move(step));
          }
        }
        return true;
      case NodeKind::kShift:
        if (use_store(kv_tensor(node))) {
          add(node, make_shift_step(&steps_context_, node, rotating_cpu_.get()));
        }
        return true;
    }
    return false;
  }

  bool use_store(const KvTensor* kv) {
    if (kv == nullptr || kv->store == nullptr) {
      refusal_ = unsupported(
          "this model keeps no values beside its keys (MLA), which is not served; run without "
          "-dev ZipCache");
      return false;
    }
    buffers_.push_back(kv->buffer);
    return true;
  }

  void add(const ggml_tensor* original, std::unique_ptr<Step> step) {
    custom_.push_back(custom_node(original, step.get()));
    nodes_.push_back(&custom_.back());
    steps_.push_back(std::move(step));
  }

  CpuBackend cpu_;
  CpuBackend rotating_cpu_;  // for steps, which run while cpu_ computes a graph
  StepContext steps_context_;

  // The rewritten graph.
  std::uint64_t uid_ = 0;  // 0 = none
  std::vector<ggml_tensor*> nodes_;
  std::deque<ggml_tensor> custom_;  // stable addresses
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<KvBuffer*> buffers_;  // whose stores it uses
  std::optional<Error> refusal_;
};

using Table = BackendTable<Backend>;

ggml_guid_t guid() {
  static ggml_guid id = {0x7a, 0x69, 0x70, 0x63, 0x61, 0x63, 0x68, 0x65,
                         0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x2d, 0x30, 0x31};
  return &id;
}

}  // namespace

ggml_backend_t make_backend(ggml_backend_dev_t device) {
  static std::atomic<std::uint64_t> next_id{1};
  return Table::create(device, guid(), [] {
    auto backend = std::make_unique<Backend>(next_id.fetch_add(1));
    return backend->valid() ? std::move(backend) : nullptr;
  });
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
  Table::of(backend)->cpu().set_n_threads(n_threads);
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data) {
  Table::of(backend)->cpu().set_abort_callback(callback, data);
}

}  // namespace zipcache::ggml
