#include "quant/byte_rows.h"

#include <algorithm>
#include <array>
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
  if (divisor == 0.0f) {
    for (std::size_t c = 0; c < x.size(); ++c) {
      codes[c * stride] = kByteZero;
    }
    return scale;
  }
  constexpr std::size_t kPart = 64;  // codes of so many channels, then their places
  std::array<std::uint8_t, kPart> part;
  for (std::size_t begin = 0; begin < x.size(); begin += kPart) {
    const std::size_t n = std::min(kPart, x.size() - begin);
    for (std::size_t i = 0; i < n; ++i) {
      // Comparisons with NaN are false: it becomes 0 by the first.
      float steps = x[begin + i] / divisor;
      steps = steps == steps ? steps : 0.0f;
      steps = steps > -kLevels ? steps : -kLevels;
      steps = steps < kLevels ? steps : kLevels;
      part[i] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(steps + kRoundingMagic) +
                                          kByteZero);
    }
    for (std::size_t i = 0; i < n; ++i) {
      codes[(begin + i) * stride] = part[i];
    }
  }
  return scale;
}

}  // namespace zipcache::quant
