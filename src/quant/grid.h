// From the range of a set of values to the grid that its codes count along: the stored (scale,
// min), and the arithmetic that turns a value into a code. All of it is float without contraction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "quant/block_codec.h"

namespace zipcache::quant {

// Inputs are limited to this, so that differences of two never overflow.
inline constexpr float kLargestInput = 0x1p100f;
inline constexpr float kLargestHalf = 65504.0f;

struct Range {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();

  void include(const Range& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
  }
};

// code = clamp(round((x - shift) / divisor), -offset, levels - offset) + offset, half to even.
struct Grid {
  float scale = 1.0f;  // x^ = scale * code + min, both as read back from their fp16 or byte form
  float min = 0.0f;
  float shift = 0.0f;
  float divisor = 1.0f;  // the scale, or infinity for an empty range: every code is 0
  float offset = 0.0f;   // an integer; 0 unless kIntegerOffset
};

inline float levels_of(int bits) { return static_cast<float>((1 << bits) - 1); }

// Shrinks a range about its centre to `fraction` of its width.
Range shrunk(Range range, float fraction);
Range with_zero(Range range);

// The value as fp16 holds it; beyond fp16's range its largest finite value.
float saturated_half(float value);

// A grid whose scale and min are stored as fp16.
Grid half_grid(Rounding rounding, Range range, int bits);

// A grid stored as two bytes (TokenParams::kByte) under a class's base.
// REQUIRES: a range with zero.
struct ByteGrid {
  Grid grid;
  std::uint8_t scale_code = 0;
  std::uint8_t zero_point = 0;
};
ByteGrid byte_grid(Range range, float base, int bits);

// Adding this to |x| < 2^22 rounds x to an integer, half to even, in the low bits of the sum.
inline constexpr float kRoundingMagic = 0x1.8p23f;

}  // namespace zipcache::quant
