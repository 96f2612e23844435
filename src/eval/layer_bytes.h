// What one layer of a cache holds after so many tokens, counted by building it.
#pragma once

#include <cstdint>
#include <memory>

#include "base/expected.h"
#include "cache/bytes.h"
#include "policy/policy.h"

namespace zipcache::eval {

struct LayerDims {
  std::uint32_t n_kv_heads = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
};

// Fills a cache with `n_tokens` rows of zeros, `tokens_per_step` at a time (1 = as in generation;
// those after `prompt_tokens` come one by one in any case), seals as the policy says, and returns
// its bytes: sizes depend on counts alone, never on values. kUnsupported when the policy or the
// cache can't serve the dimensions. REQUIRES: tokens_per_step > 0.
Expected<cache::ByteCount> layer_bytes(std::shared_ptr<const policy::Policy> policy,
                                       const LayerDims& dims, std::uint32_t n_tokens,
                                       std::uint32_t tokens_per_step,
                                       std::uint32_t prompt_tokens = UINT32_MAX);

}  // namespace zipcache::eval
