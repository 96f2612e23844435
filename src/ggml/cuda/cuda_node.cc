#include "ggml/cuda/cuda_node.h"

#include <string>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/cuda/cuda_registry.h"
#include "kernels/cuda/decode_config.h"

namespace zipcache::ggml {
namespace {

NodeClass refused(std::string reason) { return {NodeKind::kRefused, std::move(reason)}; }

std::int64_t halves(std::size_t bytes) { return static_cast<std::int64_t>(bytes / sizeof(Half)); }
std::int64_t floats(std::size_t bytes) { return static_cast<std::int64_t>(bytes / sizeof(float)); }

}  // namespace

NodeClass classify_cuda(const ggml_tensor* node) {
  NodeClass found = classify(node, cuda_buffer_type());
  if (found.kind == NodeKind::kStore && node->src[0]->type != GGML_TYPE_F32) {
    return refused(std::string("new rows of type ") + ggml_type_name(node->src[0]->type) +
                   " are not served on CUDA, f32 is");
  }
  if (found.kind != NodeKind::kAttend) {
    return found;
  }
  const AttendShape shape = attend_shape(node);
  if (shape.key_dim != shape.value_dim || !cuda::is_head_dim(static_cast<int>(shape.key_dim)) ||
      shape.n_heads / shape.n_kv_heads > cuda::kMaxGroup) {
    return refused("found heads of " + std::to_string(shape.key_dim) + "/" +
                   std::to_string(shape.value_dim) + " elements and " +
                   std::to_string(shape.n_heads) + " query heads on " +
                   std::to_string(shape.n_kv_heads) +
                   " KV heads; on CUDA 64, 128 or 256 elements and up to 8 query heads per KV head "
                   "are served; use -dev ZipCache");
  }
  return found;
}

cuda::StepTensors step_tensors(const CudaLayerNodes& nodes) {
  const AttendShape shape = attend_shape(nodes.attend);
  const ggml_tensor* rows = nodes.keys->src[1];
  const ggml_tensor* mask = nodes.attend->src[3];
  cuda::StepTensors step;
  step.rows = rows->data;
  step.rows_are_narrow = rows->type == GGML_TYPE_I32;
  if (mask != nullptr) {
    step.mask = static_cast<const Half*>(mask->data);
    step.mask_row_stride = halves(mask->nb[1]);
    step.mask_plane_stride = mask->ne[3] == 1 ? 0 : halves(mask->nb[3]);
  }
  step.first_stream = shape.first_stream;
  step.n_streams = shape.n_streams;
  step.n_per_stream = shape.n_rows;
  step.n_cells = shape.n_cells;
  step.n_heads = shape.n_heads;
  step.needs_window = shape.softcap > 0 || shape.max_bias > 0 || nodes.attend->src[4] != nullptr;
  return step;
}

cuda::LayerTensors layer_tensors(const CudaLayerNodes& nodes) {
  const AttendShape shape = attend_shape(nodes.attend);
  const ggml_tensor* q = nodes.attend->src[0];
  const ggml_tensor* sinks = nodes.attend->src[4];
  cuda::LayerTensors layer;
  layer.k = static_cast<const float*>(nodes.keys->src[0]->data);
  layer.v = static_cast<const float*>(nodes.values->src[0]->data);
  layer.k_stride = floats(nodes.keys->src[0]->nb[1]);
  layer.v_stride = floats(nodes.values->src[0]->nb[1]);
  layer.q = static_cast<const float*>(q->data);
  layer.q_query_stride = floats(q->nb[1]);
  layer.q_head_stride = floats(q->nb[2]);
  layer.q_stream_stride = floats(q->nb[3]);
  layer.out = static_cast<float*>(nodes.attend->data);
  layer.scale = shape.scale;
  layer.softcap = shape.softcap;
  layer.sinks = sinks == nullptr ? nullptr : static_cast<const float*>(sinks->data);
  return layer;
}

}  // namespace zipcache::ggml
