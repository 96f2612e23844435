// The shape of a model's KV cache, from the metadata of its GGUF file; no weights are read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/expected.h"
#include "eval/layer_bytes.h"

namespace zipcache::cli {

struct LayerGroup {
  eval::LayerDims dims;
  std::uint32_t n_layers = 0;
};

// Layers of the same dimensions are one group. Sliding windows are not looked at.
Expected<std::vector<LayerGroup>> read_gguf_shape(const std::string& path);

}  // namespace zipcache::cli
