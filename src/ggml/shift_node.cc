#include "ggml/shift_node.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "ggml/buffer.h"

namespace zipcache::ggml {
namespace {

struct ContextDeleter {
  void operator()(ggml_context* context) const { ggml_free(context); }
};

class ShiftStep final : public Step {
 public:
  ShiftStep(StepContext* context, const ggml_tensor* node, ggml_backend_t cpu)
      : Step(context, Threads::kOne), node_(node), kv_(kv_tensor(node)), cpu_(cpu) {}

  Status run(std::uint32_t /*ith*/, std::uint32_t /*n_threads*/) override {
    status_ = GGML_STATUS_SUCCESS;
    const auto* shifts = static_cast<const std::int32_t*>(node_->src[1]->data);
    for (std::uint32_t stream = 0; stream < kv_->n_streams; ++stream) {
      const std::span of_stream(shifts + std::size_t{stream} * kv_->n_cells, kv_->n_cells);
      if (std::all_of(of_stream.begin(), of_stream.end(), [](auto shift) { return shift == 0; })) {
        continue;
      }
      kv_->store->stream(stream).rotate_keys(
          [&](std::span<const std::uint32_t> cells, float* keys) {
            return rotate(of_stream, cells, keys);
          });
    }
    if (status_ != GGML_STATUS_SUCCESS) {
      return invalid_argument("shifting keys failed in the host's rotary embedding");
    }
    return ok_status();
  }

 private:
  // Rotates the keys whose cell has a shift; false when there are none.
  bool rotate(std::span<const std::int32_t> shifts, std::span<const std::uint32_t> cells,
              float* keys) {
    const std::size_t row = kv_->row;
    positions_.clear();
    moved_.clear();
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (shifts[cells[i]] != 0) {
        positions_.push_back(shifts[cells[i]]);
        moved_.insert(moved_.end(), keys + i * row, keys + (i + 1) * row);
      }
    }
    if (positions_.empty()) {
      return false;
    }
    if (const ggml_status status = apply_rope(); status != GGML_STATUS_SUCCESS) {
      status_ = status;
      return false;
    }
    std::size_t from = 0;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (shifts[cells[i]] != 0) {
        std::copy_n(moved_.data() + from, row, keys + i * row);
        from += row;
      }
    }
    return true;
  }

  // The node's operation on `moved_`, at `positions_`.
  ggml_status apply_rope() {
    const ggml_tensor* view = node_->src[0];
    const auto n = static_cast<std::int64_t>(positions_.size());
    const std::int64_t n_heads = view->ne[1];
    const std::int64_t head_dim = static_cast<std::int64_t>(kv_->row) / n_heads;
    const std::size_t head_bytes = head_dim * sizeof(float);
    const std::size_t first = view->view_offs / sizeof(Half) * sizeof(float);

    const ggml_init_params params = {.mem_size = 8 * ggml_tensor_overhead() + ggml_graph_overhead(),
                                     .mem_buffer = nullptr,
                                     .no_alloc = true};
    const std::unique_ptr<ggml_context, ContextDeleter> arena(ggml_init(params));
    ggml_tensor* keys = ggml_new_tensor_3d(arena.get(), GGML_TYPE_F32, head_dim, n_heads, n);
    keys->data = moved_.data();
    ggml_tensor* part = ggml_view_3d(arena.get(), keys, view->ne[0], n_heads, n, head_bytes,
                                     n_heads * head_bytes, first);
    ggml_tensor* positions = ggml_new_tensor_1d(arena.get(), GGML_TYPE_I32, n);
    positions->data = positions_.data();
    // Number of dimensions and mode for its checks; all parameters are then the node's.
    ggml_tensor* rope =
        ggml_rope_ext_inplace(arena.get(), part, positions, node_->src[2], node_->op_params[1],
                              node_->op_params[2], 0, 0, 0, 0, 0, 0, 0);
    std::memcpy(rope->op_params, node_->op_params, sizeof rope->op_params);
    ggml_cgraph* graph = ggml_new_graph(arena.get());
    ggml_build_forward_expand(graph, rope);
    return ggml_backend_graph_compute(cpu_, graph);
  }

  const ggml_tensor* const node_;
  const KvTensor* const kv_;
  const ggml_backend_t cpu_;
  ggml_status status_ = GGML_STATUS_SUCCESS;
  std::vector<std::int32_t> positions_;  // of the keys being rotated
  std::vector<float> moved_;             // [positions, heads, head_dim]
};

}  // namespace

std::unique_ptr<Step> make_shift_step(StepContext* context, const ggml_tensor* node,
                                      ggml_backend_t cpu) {
  return std::make_unique<ShiftStep>(context, node, cpu);
}

}  // namespace zipcache::ggml
