// A block's parameters as floats: what decoding and attention read before they touch codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/block.h"

namespace zipcache::format {

// out[i] = the fp16 at `halves` + 2 i bytes. REQUIRES: finite (parameters are).
void load_halves(const std::byte* halves, std::size_t n, float* out);

// (scale, min) of the tokens of a class and channel group in slot order, each class_tokens() long.
// REQUIRES: a tokenwise or channel_separable tensor.
void load_token_params(const BlockLayout& layout, const std::byte* block, Tensor t,
                       std::uint32_t head, int cls, std::uint32_t group, float* scale, float* min);

}  // namespace zipcache::format
