// Loops over the channels of one row of floats, written so that the compiler turns them into vector
// code. `n` is a multiple of 16 where a range is taken. No operands overlap.
#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/grid.h"

namespace zipcache::quant {

// NaN becomes 0, infinities the largest finite half, magnitudes are limited to kLargestInput, and
// -0 becomes 0 (so that no result depends on the order in which minima are taken).
void copy_finite(const float* from, std::size_t n, float* to);

// x[c] /= factors[c], without -0.
void divide(float* x, const float* factors, std::size_t n);

// Running |maximum| and range of each channel.
void track_magnitudes(const float* x, std::size_t n, float* largest);
void track_ranges(const float* x, std::size_t n, float* low, float* high);

// Range of the row as a whole. REQUIRES: n > 0, a multiple of 16.
Range range_of(const float* x, std::size_t n);

// The grids of a row's channels, one array per member that codes need.
struct ChannelGrids {
  const float* shift;
  const float* divisor;
  const float* offset;
};
void codes_by_channel(const float* x, std::size_t n, const ChannelGrids& grids, float levels,
                      std::uint8_t* codes);

// One grid for the whole row.
void codes_by_row(const float* x, std::size_t n, const Grid& grid, float levels,
                  std::uint8_t* codes);

// x . x / x . y for y = scale * code + min, both times `factors`; 1 where that makes no sense or is
// out of [1/2, 2]. REQUIRES: n a multiple of 16.
float length_ratio(const float* x, const float* factors, const std::uint8_t* codes, std::size_t n,
                   float scale, float min);

// [rows][columns] -> [columns][rows]: codes are made by token, V is packed by channel.
void transpose(const std::uint8_t* from, std::size_t rows, std::size_t columns, std::uint8_t* to);

}  // namespace zipcache::quant
