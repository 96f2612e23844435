// FLASH_ATTN_EXT over a KV cache of ours: two steps for each stream.
#pragma once

#include <memory>
#include <vector>

#include "ggml/step.h"

namespace zipcache::ggml {

// REQUIRES: classify(node) is kAttend and its tensors have a store.
std::vector<std::unique_ptr<Step>> make_attention_steps(StepContext* context,
                                                        const ggml_tensor* node);

// ALiBi's factors of the mask's bias, one for each head.
std::vector<float> alibi_slopes(std::uint32_t n_heads, float max_bias);

}  // namespace zipcache::ggml
