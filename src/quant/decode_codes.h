// What a head's codes stand for, before corrections. Internal to this room.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/block.h"

namespace zipcache::quant {

// rows [n_tokens, head_dim] of a head, in slot order and stored channel order.
void decode_codes(const format::BlockLayout& layout, format::Tensor t, const std::byte* block,
                  std::uint32_t head, float* rows);

}  // namespace zipcache::quant
