// A block's parameters as floats: what decoding and attention read before they touch codes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "format/block.h"

namespace zipcache::format {

// out[i] = the fp16 at `halves` + 2 i bytes. REQUIRES: finite (parameters are).
void load_halves(const std::byte* halves, std::size_t n, float* out);

// (scale, min) of the tokens of a class and channel group in slot order, each class_tokens() long.
// REQUIRES: a tokenwise or channel_separable tensor, a class with codes.
void load_token_params(const BlockLayout& layout, const std::byte* block, Tensor t,
                       std::uint32_t head, int cls, std::uint32_t group, float* scale, float* min);

// call(vector, place, value) for every outlier of a head; see BlockLayout::outliers().
template <typename Call>
void for_each_outlier(const BlockLayout& layout, const std::byte* block, Tensor t,
                      std::uint32_t head, const Call& call) {
  const std::size_t per_vector = layout.tensor(t).outliers;
  const std::size_t n = layout.outlier_vectors(t) * per_vector;
  const std::byte* places = block + layout.outliers(t, head);
  const std::byte* values = places + n * sizeof(std::uint16_t);
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t place;
    Half value;
    std::memcpy(&place, places + i * sizeof place, sizeof place);
    std::memcpy(&value, values + i * sizeof value, sizeof value);
    call(static_cast<std::uint32_t>(i / per_vector), std::uint32_t{place}, half_to_float(value));
  }
}

}  // namespace zipcache::format
