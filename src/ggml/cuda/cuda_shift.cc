#include "ggml/cuda/cuda_shift.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/cuda/cuda_buffer.h"

namespace zipcache::ggml {
namespace {

struct ContextDeleter {
  void operator()(ggml_context* context) const { ggml_free(context); }
};

// The node's operation on `keys` [n, heads, head_dim], at `positions`; both device memory.
Status apply_rope(const ggml_tensor* node, ggml_backend_t inner, std::uint32_t row, float* keys,
                  const std::int32_t* positions, std::uint32_t n) {
  const ggml_tensor* const view = node->src[0];
  const std::int64_t n_heads = view->ne[1];
  const std::int64_t head_dim = static_cast<std::int64_t>(row) / n_heads;
  const std::size_t head_bytes = head_dim * sizeof(float);
  const std::size_t first = view->view_offs / sizeof(Half) * sizeof(float);

  const ggml_init_params params = {.mem_size = 8 * ggml_tensor_overhead() + ggml_graph_overhead(),
                                   .mem_buffer = nullptr,
                                   .no_alloc = true};
  const std::unique_ptr<ggml_context, ContextDeleter> arena(ggml_init(params));
  // The memory is ours; the host looks at a buffer's type only.
  const auto place = [&](ggml_tensor* tensor, const void* at) {
    tensor->data = const_cast<void*>(at);
    tensor->buffer = node->src[1]->buffer;
    return tensor;
  };
  ggml_tensor* const all =
      place(ggml_new_tensor_3d(arena.get(), GGML_TYPE_F32, head_dim, n_heads, n), keys);
  ggml_tensor* const part = place(ggml_view_3d(arena.get(), all, view->ne[0], n_heads, n,
                                               head_bytes, n_heads * head_bytes, first),
                                  reinterpret_cast<std::byte*>(keys) + first);
  ggml_tensor* const at = place(ggml_new_tensor_1d(arena.get(), GGML_TYPE_I32, n), positions);
  // Number of dimensions and mode for its checks; all parameters are then the node's.
  ggml_tensor* const rope =
      place(ggml_rope_ext_inplace(arena.get(), part, at, node->src[2], node->op_params[1],
                                  node->op_params[2], 0, 0, 0, 0, 0, 0, 0),
            part->data);
  std::memcpy(rope->op_params, node->op_params, sizeof rope->op_params);
  ggml_cgraph* const graph = ggml_new_graph(arena.get());
  ggml_build_forward_expand(graph, rope);
  return ggml_backend_graph_compute(inner, graph) == GGML_STATUS_SUCCESS
             ? ok_status()
             : Status(invalid_argument("shifting keys failed in the host's rotary embedding"));
}

}  // namespace

Status shift_keys(const ggml_tensor* node, ggml_backend_t inner, cuda::Stream stream) {
  const CudaKvTensor& kv = *cuda_kv_tensor(node);
  const CudaGroup& group = *kv.group;
  if (group.cache == nullptr) {
    return ok_status();
  }
  ggml_backend_synchronize(inner);
  std::vector<std::int32_t> shifts(std::size_t{group.n_streams} * group.n_cells);
  ggml_backend_tensor_get(node->src[1], shifts.data(), 0, shifts.size() * sizeof(std::int32_t));
  for (std::uint32_t of_stream = 0; of_stream < group.n_streams; ++of_stream) {
    const std::span<const std::int32_t> of_cells =
        std::span(shifts).subspan(std::size_t{of_stream} * group.n_cells, group.n_cells);
    if (std::all_of(of_cells.begin(), of_cells.end(), [](std::int32_t x) { return x == 0; })) {
      continue;
    }
    Status done = group.cache->rotate_keys(
        kv.index, of_stream, of_cells,
        [&](float* keys, const std::int32_t* positions, std::uint32_t n) {
          return apply_rope(node, inner, group.row, keys, positions, n);
        },
        stream);
    if (!done) {
      return done;
    }
  }
  return ok_status();
}

}  // namespace zipcache::ggml
