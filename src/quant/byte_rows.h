// Rows in 8 bits, for tokens that wait to be sealed: the channels of a head share one fp16 scale,
// x^ = scale * (code - 128). docs/formats.md, "Rows in 8 bits".
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/half.h"

namespace zipcache::quant {

inline constexpr int kByteZero = 128;  // the code of 0; codes are 1..255

// Writes the code of x[c] to codes[c * stride] and returns the scale. NaN counts as 0, magnitudes
// above fp16's as its largest.
Half encode_byte_row(std::span<const float> x, std::uint8_t* codes, std::size_t stride);

inline float decode_byte(float scale, std::uint8_t code) {
  return scale * static_cast<float>(static_cast<int>(code) - kByteZero);
}

}  // namespace zipcache::quant
