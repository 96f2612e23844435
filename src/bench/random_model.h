// GGUF models with the shape of real ones and random weights, for measuring speed where the real
// file is too large or not at hand. The same bytes from the same seed.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/expected.h"

namespace zipcache::bench {

struct ModelShape {
  const char* name;
  std::uint32_t n_layers, n_embd, n_ff, n_heads, n_kv_heads, n_vocab;
  float rope_base;
};

// "tiny": for tests. "smollm2-135m": all of SmolLM2-135M. "llama3-8b-4l": four layers of
// Llama-3-8B, with a small vocabulary, which would otherwise weigh more than the layers.
Expected<ModelShape> model_shape(std::string_view name);
std::string model_shape_names();

// Writes a llama model with Q4_0 weights and a vocabulary of bytes and fillers, unless `path` is
// there already.
Status write_random_model(const ModelShape& shape, std::uint64_t seed, const std::string& path);

}  // namespace zipcache::bench
