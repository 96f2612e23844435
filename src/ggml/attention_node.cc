#include "ggml/attention_node.h"

#include <bit>
#include <cmath>

#include "ggml.h"
#include "ggml/buffer.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

class PrepareStep final : public Step {
 public:
  PrepareStep(StepContext* context, const ggml_tensor* node, const AttendShape& shape,
              std::uint32_t stream)
      : Step(context, Threads::kOne),
        node_(node),
        store_(kv_tensor(node->src[1])->store),
        shape_(shape),
        stream_(stream),
        slopes_(alibi_slopes(shape.n_heads, shape.max_bias)) {}

  Status run(std::uint32_t /*ith*/, std::uint32_t n_threads) override {
    const std::uint32_t stream = shape_.first_stream + stream_;
    cache::LayerCache& cache = store_->stream(stream);
    Status known = cache.set_heads(shape_.n_kv_heads, shape_.key_dim, shape_.value_dim);
    if (!known) {
      return known;
    }
    cache::Query query = operands();
    if (ChannelObserver* observer = store_->observer()) {
      observer->add_queries(query, shape_.n_kv_heads, shape_.key_dim, shape_.value_dim);
    }
    query.visible =
        context().visibilities.get(node_->src[3], stream_, shape_.n_rows, shape_.n_cells);
    // Another context may attend to a cache that it does not write (a draft model sharing its
    // target's): its rows are not the cache's newest tokens.
    query.rows_are_newest =
        store_->written_by(stream, context().id) && cache.newest_cells().size() == shape_.n_rows;
    return context().attention.prepare(cache, query, n_threads);
  }

 private:
  cache::Query operands() const {
    const ggml_tensor* q = node_->src[0];
    const ggml_tensor* sinks = node_->src[4];
    const auto floats = [](std::size_t bytes) { return bytes / sizeof(float); };
    cache::Query query;
    query.q = static_cast<const float*>(q->data) + stream_ * floats(q->nb[3]);
    query.q_row_stride = floats(q->nb[1]);
    query.q_head_stride = floats(q->nb[2]);
    query.out = static_cast<float*>(node_->data) + stream_ * floats(node_->nb[3]);
    query.out_row_stride = floats(node_->nb[2]);
    query.out_head_stride = floats(node_->nb[1]);
    query.n_rows = shape_.n_rows;
    query.n_heads = shape_.n_heads;
    query.scale = shape_.scale;
    query.softcap = shape_.softcap;
    query.slopes = slopes_.empty() ? nullptr : slopes_.data();
    query.sinks = sinks == nullptr ? nullptr : static_cast<const float*>(sinks->data);
    return query;
  }

  const ggml_tensor* const node_;
  KvStore* const store_;
  const AttendShape shape_;
  const std::uint32_t stream_;  // counted from shape_.first_stream
  const std::vector<float> slopes_;
};

// Saliency and sealing are in it: a node of their own would cost all threads one more barrier in
// every layer.
class RunStep final : public Step {
 public:
  explicit RunStep(StepContext* context) : Step(context, Threads::kAll) {}
  Status run(std::uint32_t ith, std::uint32_t /*n_threads*/) override {
    return context().attention.run_together(ith);
  }
};

}  // namespace

std::vector<std::unique_ptr<Step>> make_attention_steps(StepContext* context,
                                                        const ggml_tensor* node) {
  const AttendShape shape = attend_shape(node);
  std::vector<std::unique_ptr<Step>> steps;
  for (std::uint32_t stream = 0; stream < shape.n_streams; ++stream) {
    steps.push_back(std::make_unique<PrepareStep>(context, node, shape, stream));
    steps.push_back(std::make_unique<RunStep>(context));
  }
  return steps;
}

// Two geometric series: one for the first 2^k heads, one between its members for the others.
std::vector<float> alibi_slopes(std::uint32_t n_heads, float max_bias) {
  if (max_bias <= 0.0f) {
    return {};
  }
  const std::uint32_t n_first = std::bit_floor(n_heads);
  const auto base = [n_first](float bias) { return std::exp2(-bias / float(n_first)); };
  std::vector<float> slopes(n_heads);
  for (std::uint32_t head = 0; head < n_heads; ++head) {
    slopes[head] = head < n_first ? std::pow(base(max_bias), float(head + 1))
                                  : std::pow(base(max_bias / 2), float(2 * (head - n_first) + 1));
  }
  return slopes;
}

}  // namespace zipcache::ggml
