#include "ggml/store_node.h"

#include <span>

#include "ggml.h"
#include "ggml/buffer.h"

namespace zipcache::ggml {
namespace {

class StoreStep final : public Step {
 public:
  StoreStep(StepContext* context, const ggml_tensor* node)
      : Step(context, Threads::kOne), node_(node), kv_(kv_tensor(node)) {}

  Status run(std::uint32_t /*ith*/, std::uint32_t /*n_threads*/) override {
    const ggml_tensor* rows = node_->src[0];
    const cache::RowsView view{rows->data, rows->nb[1], rows->type == GGML_TYPE_F16};
    return kv_->store->put(kv_->tensor, global_rows(node_->src[1]), view, context().id);
  }

 private:
  std::span<const std::int64_t> global_rows(const ggml_tensor* index) {
    const auto n = static_cast<std::size_t>(index->ne[0]);
    if (index->type == GGML_TYPE_I64) {
      return {static_cast<const std::int64_t*>(index->data), n};
    }
    const auto* narrow = static_cast<const std::int32_t*>(index->data);
    widened_.assign(narrow, narrow + n);
    return widened_;
  }

  const ggml_tensor* const node_;
  const KvTensor* const kv_;
  std::vector<std::int64_t> widened_;
};

}  // namespace

std::unique_ptr<Step> make_store_step(StepContext* context, const ggml_tensor* node) {
  return std::make_unique<StoreStep>(context, node);
}

}  // namespace zipcache::ggml
