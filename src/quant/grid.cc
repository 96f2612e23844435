#include "quant/grid.h"

#include "base/half.h"
#include "format/block.h"

namespace zipcache::quant {
namespace {

// Offsets beyond this can't be told apart in fp16 anyway; code_of() needs less than 2^22.
constexpr float kLargestOffset = 0x1p21f;

float round_to_integer(float value) { return (value + kRoundingMagic) - kRoundingMagic; }

}  // namespace

Range shrunk(Range range, float fraction) {
  const float margin = (range.high - range.low) * ((1.0f - fraction) * 0.5f);
  return {range.low + margin, range.high - margin};
}

Range with_zero(Range range) { return {std::min(range.low, 0.0f), std::max(range.high, 0.0f)}; }

float saturated_half(float value) {
  return round_to_half(std::clamp(value, -kLargestHalf, kLargestHalf));
}

Grid half_grid(Rounding rounding, Range range, int bits) {
  Grid grid;
  grid.scale = saturated_half((range.high - range.low) / levels_of(bits));
  if (!(grid.scale > 0)) {
    grid.scale = 1.0f;
    grid.min = saturated_half(range.low);
    grid.divisor = std::numeric_limits<float>::infinity();
    return grid;
  }
  grid.divisor = grid.scale;
  if (rounding == Rounding::kFloatMin) {
    grid.min = saturated_half(range.low);
    grid.shift = grid.min;
  } else {
    const float steps = std::clamp(range.low / grid.scale, -kLargestOffset, kLargestOffset);
    grid.offset = 0.0f - round_to_integer(steps);
    grid.min = saturated_half(0.0f - grid.offset * grid.scale);
  }
  return grid;
}

ByteGrid byte_grid(Range range, float base, int bits) {
  ByteGrid out;
  const float levels = levels_of(bits);
  out.scale_code = format::encode_byte_scale(base, (range.high - range.low) / levels);
  const float scale = format::byte_scale(base, out.scale_code);
  const float zero_point = -range.low / scale * (255.0f / levels);
  out.zero_point =
      static_cast<std::uint8_t>(round_to_integer(std::clamp(zero_point, 0.0f, 255.0f)));
  out.grid.scale = scale;
  out.grid.min = format::byte_min(scale, out.zero_point, bits);
  out.grid.shift = out.grid.min;
  out.grid.divisor = scale;
  return out;
}

}  // namespace zipcache::quant
