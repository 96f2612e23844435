// In-place ROPE of all keys of a layer (context shift): the host's own kernel turns them, as
// floats.
#pragma once

#include "base/expected.h"
#include "cache/cuda/device_cache.h"
#include "ggml-backend.h"

struct ggml_tensor;

namespace zipcache::ggml {

// REQUIRES: classify_cuda(node) says kShift. Waits for `inner`, a CUDA backend of the host, which
// may still be writing the shifts. Work on the cache goes to `stream`.
Status shift_keys(const ggml_tensor* node, ggml_backend_t inner, cuda::Stream stream);

}  // namespace zipcache::ggml
