// Which cells each query row may see: one bit per (row, cell), made once per mask and shared by all
// layers and threads that use it. The engine's mask is the only authority on visibility (causal
// order, sliding windows, other sequences, removed cells).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/half.h"

namespace zipcache::cache {

class Visibility {
 public:
  // mask: [n_rows, n_cells] fp16, row r at mask + r * stride_halves; -infinity hides, any other
  // value is an additive bias (usually 0). nullptr: everything is visible. The mask must outlive
  // this object when has_bias(). Reuses its memory.
  void assign(const Half* mask, std::size_t stride_halves, std::uint32_t n_rows,
              std::uint32_t n_cells);

  std::uint32_t n_rows() const { return n_rows_; }
  std::uint32_t n_cells() const { return n_cells_; }
  bool has_bias() const { return has_bias_; }

  // False for cells beyond n_cells().
  bool sees(std::uint32_t row, std::uint32_t cell) const {
    return cell < n_cells_ && ((words(row)[cell / 64] >> (cell % 64)) & 1u) != 0;
  }
  float bias(std::uint32_t row, std::uint32_t cell) const {
    return half_to_float(mask_[row * stride_halves_ + cell]);
  }
  // Bits [first, first + n) of a row as little-endian words; out is (n + 63) / 64 long, bits beyond
  // n are 0.
  void extract(std::uint32_t row, std::uint32_t first, std::uint32_t n, std::uint64_t* out) const;

 private:
  const std::uint64_t* words(std::uint32_t row) const {
    return bits_.data() + std::size_t{row} * words_per_row_;
  }

  std::uint32_t n_rows_ = 0;
  std::uint32_t n_cells_ = 0;
  std::size_t words_per_row_ = 0;
  std::vector<std::uint64_t> bits_;
  const Half* mask_ = nullptr;
  std::size_t stride_halves_ = 0;
  bool has_bias_ = false;
};

}  // namespace zipcache::cache
