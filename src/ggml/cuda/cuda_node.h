// What becomes of the nodes that touch a KV cache on CUDA: take_over.h, less what the kernels there
// do not serve. A layer's two stores and its attention are one piece of work.
#pragma once

#include "ggml/cuda/cuda_buffer.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {

NodeClass classify_cuda(const ggml_tensor* node);

struct CudaLayerNodes {
  const ggml_tensor* keys = nullptr;    // SET_ROWS
  const ggml_tensor* values = nullptr;  // SET_ROWS
  const ggml_tensor* attend = nullptr;  // FLASH_ATTN_EXT
};

// The step that these nodes belong to, and the layer's own tensors. Their memory is the host's and
// must be allocated.
cuda::StepTensors step_tensors(const CudaLayerNodes& nodes);
cuda::LayerTensors layer_tensors(const CudaLayerNodes& nodes);

}  // namespace zipcache::ggml
