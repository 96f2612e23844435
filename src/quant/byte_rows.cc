#include "quant/byte_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "quant/grid.h"

namespace zipcache::quant {
namespace {

constexpr float kLevels = 127.0f;  // on either side of 0

}  // namespace

Half encode_byte_row(std::span<const float> x, std::uint8_t* codes, std::size_t stride) {
  float largest = 0.0f;
  for (const float value : x) {
    largest = std::max(largest, std::abs(value));  // NaN comes second: ignored
  }
  largest = std::min(largest, kLargestHalf);
  Half scale = float_to_half(largest / kLevels);
  // Rounded up, so that the largest value is within reach.
  if (half_to_float(scale) * kLevels < largest) {
    ++scale;
  }
  const float divisor = half_to_float(scale);
  for (std::size_t c = 0; c < x.size(); ++c) {
    const float steps = divisor > 0.0f ? x[c] / divisor : 0.0f;
    const float code = std::isnan(steps) ? 0.0f : std::clamp(steps, -kLevels, kLevels);
    const auto rounded = std::bit_cast<std::uint32_t>(code + kRoundingMagic);
    codes[c * stride] = static_cast<std::uint8_t>(rounded + kByteZero);
  }
  return scale;
}

}  // namespace zipcache::quant
