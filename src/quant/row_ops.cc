#include "quant/row_ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace zipcache::quant {
namespace {

constexpr std::size_t kLanes = 16;

// See Grid. The low byte of a sum with kRoundingMagic is that of the rounded integer.
inline std::uint8_t code_of(float x, float shift, float divisor, float offset, float levels) {
  float steps = (x - shift) / divisor;
  steps = steps > -offset ? steps : -offset;
  steps = steps < levels - offset ? steps : levels - offset;
  const auto rounded = std::bit_cast<std::int32_t>(steps + kRoundingMagic);
  return static_cast<std::uint8_t>(rounded + static_cast<std::int32_t>(offset));
}

float finite(float x) {
  if (std::isnan(x)) {
    return 0.0f;
  }
  if (std::isinf(x)) {
    return std::copysign(kLargestHalf, x);
  }
  return std::clamp(x, -kLargestInput, kLargestInput) + 0.0f;
}

constexpr std::size_t kTile = 8;

// 8 x 8 bytes, a row per 64-bit word: swaps the off-diagonal quarters, then those of each quarter,
// then of each quarter of a quarter. (A byte at a time took a fifth of encoding.)
void transpose_tile(const std::uint8_t* from, std::size_t from_stride, std::uint8_t* to,
                    std::size_t to_stride) {
  std::uint64_t word[kTile];
  for (std::size_t row = 0; row < kTile; ++row) {
    std::memcpy(&word[row], from + row * from_stride, kTile);
  }
  const auto swap_quarters = [&](std::size_t step, std::uint64_t low_bytes) {
    for (std::size_t row = 0; row < kTile; ++row) {
      if ((row & step) == 0) {
        const std::uint64_t change = (word[row] >> (8 * step) ^ word[row + step]) & low_bytes;
        word[row + step] ^= change;
        word[row] ^= change << (8 * step);
      }
    }
  };
  swap_quarters(4, 0x00000000ffffffffu);
  swap_quarters(2, 0x0000ffff0000ffffu);
  swap_quarters(1, 0x00ff00ff00ff00ffu);
  for (std::size_t row = 0; row < kTile; ++row) {
    std::memcpy(to + row * to_stride, &word[row], kTile);
  }
}

}  // namespace

void copy_finite(const float* __restrict from, std::size_t n, float* __restrict to) {
  std::int32_t largest = 0;  // magnitudes of floats are ordered as their bits are
  for (std::size_t c = 0; c < n; ++c) {
    const std::int32_t magnitude = std::bit_cast<std::int32_t>(from[c]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
    to[c] = from[c] + 0.0f;
  }
  if (largest > std::bit_cast<std::int32_t>(kLargestInput)) {
    std::transform(from, from + n, to, finite);
  }
}

void divide(float* __restrict x, const float* __restrict factors, std::size_t n) {
  for (std::size_t c = 0; c < n; ++c) {
    x[c] = x[c] / factors[c] + 0.0f;  // a tiny negative quotient may have become -0
  }
}

void track_magnitudes(const float* __restrict x, std::size_t n, float* __restrict largest) {
  for (std::size_t c = 0; c < n; ++c) {
    const float magnitude = std::fabs(x[c]);
    largest[c] = magnitude > largest[c] ? magnitude : largest[c];
  }
}

void track_ranges(const float* __restrict x, std::size_t n, float* __restrict low,
                  float* __restrict high) {
  for (std::size_t c = 0; c < n; ++c) {
    low[c] = x[c] < low[c] ? x[c] : low[c];
    high[c] = x[c] > high[c] ? x[c] : high[c];
  }
}

Range range_of(const float* x, std::size_t n) {
  float low[kLanes], high[kLanes];
  std::copy_n(x, kLanes, low);
  std::copy_n(x, kLanes, high);
  for (std::size_t begin = kLanes; begin < n; begin += kLanes) {
    track_ranges(x + begin, kLanes, low, high);
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) {
      low[lane] = std::min(low[lane], low[lane + half]);
      high[lane] = std::max(high[lane], high[lane + half]);
    }
  }
  return {low[0], high[0]};
}

void codes_by_channel(const float* __restrict x, std::size_t n, const ChannelGrids& grids,
                      float levels, std::uint8_t* __restrict codes) {
  const float* __restrict shift = grids.shift;
  const float* __restrict divisor = grids.divisor;
  const float* __restrict offset = grids.offset;
  for (std::size_t c = 0; c < n; ++c) {
    codes[c] = code_of(x[c], shift[c], divisor[c], offset[c], levels);
  }
}

void codes_by_row(const float* __restrict x, std::size_t n, const Grid& grid, float levels,
                  std::uint8_t* __restrict codes) {
  const Grid g = grid;
  for (std::size_t c = 0; c < n; ++c) {
    codes[c] = code_of(x[c], g.shift, g.divisor, g.offset, levels);
  }
}

float length_ratio(const float* __restrict x, const float* __restrict factors,
                   const std::uint8_t* __restrict codes, std::size_t n, float scale, float min) {
  float xx[kLanes] = {}, xy[kLanes] = {};
  for (std::size_t c = 0; c < n; c += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float weight = factors[c + lane] * factors[c + lane];
      const float y = scale * static_cast<float>(codes[c + lane]) + min;
      xx[lane] += weight * (x[c + lane] * x[c + lane]);
      xy[lane] += weight * (x[c + lane] * y);
    }
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) {
      xx[lane] += xx[lane + half];
      xy[lane] += xy[lane + half];
    }
  }
  const float ratio = xx[0] / xy[0];
  return ratio >= 0.5f && ratio <= 2.0f ? ratio : 1.0f;
}

void transpose(const std::uint8_t* __restrict from, std::size_t rows, std::size_t columns,
               std::uint8_t* __restrict to) {
  for (std::size_t row = 0; row < rows; row += kTile) {
    for (std::size_t column = 0; column < columns; column += kTile) {
      if (row + kTile <= rows && column + kTile <= columns) {
        transpose_tile(from + row * columns + column, columns, to + column * rows + row, rows);
        continue;
      }
      for (std::size_t r = row; r < std::min(row + kTile, rows); ++r) {
        for (std::size_t c = column; c < std::min(column + kTile, columns); ++c) {
          to[c * rows + r] = from[r * columns + c];
        }
      }
    }
  }
}

}  // namespace zipcache::quant
