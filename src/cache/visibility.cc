#include "cache/visibility.h"

#include <algorithm>

#include "base/check.h"

namespace zipcache::cache {
namespace {

constexpr Half kMinusInfinity = 0xfc00;

// Bit i = mask[i] is visible; *any_bias collects values other than 0 and -infinity.
std::uint64_t visible_word(const Half* mask, std::uint32_t n, bool* any_bias) {
  std::uint64_t word = 0;
  unsigned bias = 0;
  for (std::uint32_t i = 0; i < n; ++i) {
    const bool hidden = mask[i] == kMinusInfinity;
    word |= std::uint64_t{!hidden} << i;
    bias |= hidden ? 0u : mask[i] & 0x7fffu;
  }
  *any_bias |= bias != 0;
  return word;
}

}  // namespace

void Visibility::assign(const Half* mask, std::size_t stride_halves, std::uint32_t n_rows,
                        std::uint32_t n_cells) {
  n_rows_ = n_rows;
  n_cells_ = n_cells;
  words_per_row_ = (n_cells + 63) / 64;
  mask_ = mask;
  stride_halves_ = stride_halves;
  has_bias_ = false;
  bits_.resize(words_per_row_ * n_rows);
  for (std::uint32_t row = 0; row < n_rows; ++row) {
    std::uint64_t* out = bits_.data() + row * words_per_row_;
    for (std::uint32_t cell = 0; cell < n_cells; cell += 64) {
      const std::uint32_t n = std::min<std::uint32_t>(64, n_cells - cell);
      out[cell / 64] = mask == nullptr
                           ? ~std::uint64_t{0} >> (64 - n)
                           : visible_word(mask + row * stride_halves + cell, n, &has_bias_);
    }
  }
}

void Visibility::extract(std::uint32_t row, std::uint32_t first, std::uint32_t n,
                         std::uint64_t* out) const {
  const std::uint64_t* in = words(row);
  const std::uint32_t shift = first % 64;
  for (std::uint32_t begin = 0; begin < n; begin += 64) {
    const std::size_t word = (std::size_t{first} + begin) / 64;
    std::uint64_t bits = word < words_per_row_ ? in[word] >> shift : 0;
    if (shift != 0 && word + 1 < words_per_row_) {
      bits |= in[word + 1] << (64 - shift);
    }
    if (n - begin < 64) {
      bits &= ~std::uint64_t{0} >> (64 - (n - begin));
    }
    out[begin / 64] = bits;
  }
}

}  // namespace zipcache::cache
