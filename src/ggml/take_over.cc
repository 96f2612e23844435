#include "ggml/take_over.h"

#include <cstring>

#include "ggml-backend-impl.h"
#include "ggml.h"

namespace zipcache::ggml {
namespace {

constexpr std::int64_t kHeadDimMultiple = 16, kHeadDimMax = 512;

// Operands of ggml_flash_attn_ext, in the order of src[].
constexpr int kQuery = 0, kKeys = 1, kValues = 2, kMask = 3;

NodeClass refused(std::string reason) { return {NodeKind::kRefused, std::move(reason)}; }

bool is_view_op(ggml_op op) {
  return op == GGML_OP_NONE || op == GGML_OP_VIEW || op == GGML_OP_RESHAPE ||
         op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

bool is_keys(const ggml_tensor* base) {
  const auto name = parse_kv_name(base->name);
  return name && name->tensor == Tensor::kKey;
}

// [dim, n_cells, n_kv_heads, n_streams] over whole rows of the base, starting at cell 0 of a
// stream.
bool is_rows_by_head(const ggml_tensor* view, const ggml_tensor* base) {
  return view->nb[0] == sizeof(Half) && view->nb[1] == base->nb[1] &&
         view->nb[2] == view->ne[0] * sizeof(Half) && view->ne[0] * view->ne[2] == base->ne[0] &&
         view->view_offs % base->nb[2] == 0 && (view->ne[3] == 1 || view->nb[3] == base->nb[2]);
}

NodeClass classify_store(const ggml_tensor* node, const ggml_tensor* base) {
  if (node->ne[0] != base->ne[0]) {
    return refused("values are stored transposed, as without flash attention; run with -fa on");
  }
  const ggml_tensor* rows = node->src[0];
  const ggml_tensor* index = node->src[1];
  if (rows->ne[2] != 1 || rows->ne[3] != 1 || index->ne[1] != 1 || index->ne[2] != 1) {
    return refused("new rows come in more than two dimensions");
  }
  return {NodeKind::kStore, {}};
}

NodeClass classify_attend(const ggml_tensor* node, ggml_backend_buffer_type_t ours) {
  const ggml_tensor* query = node->src[kQuery];
  const ggml_tensor* keys = node->src[kKeys];
  const ggml_tensor* values = node->src[kValues];
  const ggml_tensor* mask = node->src[kMask];
  if (is_keys(base_of(values))) {
    return refused(
        "this model keeps no values beside its keys (MLA), which is not served; "
        "run without -dev ZipCache");
  }
  if (!is_kv(keys, ours) || !is_kv(values, ours)) {
    return refused("keys and values lie on different devices");
  }
  for (const std::int64_t dim : {keys->ne[0], values->ne[0]}) {
    if (dim % kHeadDimMultiple != 0 || dim > kHeadDimMax) {
      return refused("heads of " + std::to_string(dim) +
                     " elements are not served; supported: "
                     "multiples of 16 up to 512");
    }
  }
  if (!is_rows_by_head(keys, base_of(keys)) || !is_rows_by_head(values, base_of(values))) {
    return refused("attention reads the cache in an unknown layout");
  }
  if (query->type != GGML_TYPE_F32 || node->type != GGML_TYPE_F32 ||
      query->nb[0] != sizeof(float) || query->ne[3] != keys->ne[3] ||
      query->ne[2] % keys->ne[2] != 0) {
    return refused("attention queries come in an unknown layout");
  }
  if (mask != nullptr &&
      (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(Half) || mask->ne[0] != keys->ne[1] ||
       mask->ne[1] < query->ne[1] || mask->ne[2] != 1 || query->ne[3] % mask->ne[3] != 0)) {
    return refused("attention masks per head are not served");
  }
  return {NodeKind::kAttend, {}};
}

// Whole heads or their first or last elements, every cell of every stream.
NodeClass classify_shift(const ggml_tensor* node, const ggml_tensor* base) {
  const ggml_tensor* keys = node->src[0];
  const bool whole_cache = keys->ne[2] == base->ne[1] * base->ne[2] && keys->ne[3] == 1 &&
                           keys->nb[2] == base->nb[1] && keys->view_offs < keys->nb[1] &&
                           keys->ne[1] * static_cast<std::int64_t>(keys->nb[1]) ==
                               static_cast<std::int64_t>(base->nb[1]);
  if (!is_keys(base) || base_of(keys) != base || !whole_cache ||
      node->src[1]->type != GGML_TYPE_I32 || node->src[1]->ne[0] != keys->ne[2]) {
    return refused("this model's context shift is not served");
  }
  return {NodeKind::kShift, {}};
}

}  // namespace

const ggml_tensor* base_of(const ggml_tensor* tensor) {
  return tensor->view_src != nullptr ? tensor->view_src : tensor;
}

bool is_kv(const ggml_tensor* tensor, ggml_backend_buffer_type_t ours) {
  const ggml_tensor* base = base_of(tensor);
  return base->buffer != nullptr && base->buffer->buft == ours && base->op == GGML_OP_NONE &&
         parse_kv_name(base->name).has_value();
}

NodeClass classify(const ggml_tensor* node, ggml_backend_buffer_type_t ours) {
  if (is_view_op(node->op)) {
    return {};
  }
  if (node->view_src != nullptr && is_kv(node, ours)) {
    const ggml_tensor* base = base_of(node);
    switch (node->op) {
      case GGML_OP_SET_ROWS:
        return classify_store(node, base);
      case GGML_OP_ROPE:
        return classify_shift(node, base);
      default:
        return refused(std::string(ggml_op_name(node->op)) + " into the KV cache is not served");
    }
  }
  if (node->op == GGML_OP_FLASH_ATTN_EXT && parse_kv_name(base_of(node->src[kKeys])->name) &&
      !is_kv(node->src[kKeys], ours)) {
    return {NodeKind::kElsewhere, {}};
  }
  for (const ggml_tensor* source : node->src) {
    if (source == nullptr || !is_kv(source, ours)) {
      continue;
    }
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      return classify_attend(node, ours);
    }
    return refused(std::string(ggml_op_name(node->op)) +
                   " reads the KV cache, as without flash attention; run with -fa on");
  }
  return {};
}

AttendShape attend_shape(const ggml_tensor* node) {
  const ggml_tensor* query = node->src[kQuery];
  const ggml_tensor* keys = node->src[kKeys];
  const ggml_tensor* values = node->src[kValues];
  const auto narrow = [](std::int64_t n) { return static_cast<std::uint32_t>(n); };
  AttendShape shape;
  shape.n_rows = narrow(query->ne[1]);
  shape.n_heads = narrow(query->ne[2]);
  shape.n_kv_heads = narrow(keys->ne[2]);
  shape.key_dim = narrow(keys->ne[0]);
  shape.value_dim = narrow(values->ne[0]);
  shape.n_cells = narrow(keys->ne[1]);
  shape.first_stream = narrow(static_cast<std::int64_t>(keys->view_offs / base_of(keys)->nb[2]));
  shape.n_streams = narrow(keys->ne[3]);
  float params[3];
  std::memcpy(params, node->op_params, sizeof params);
  shape.scale = params[0];
  shape.max_bias = params[1];
  shape.softcap = params[2];
  return shape;
}

}  // namespace zipcache::ggml
