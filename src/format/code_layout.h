// The numbers of the code-matrix layout (code_matrix.h holds the rule). Apart from that header
// because units compiled for one instruction set include it: everything here is a constant or is
// inlined at every optimisation level, so such a unit never emits a shared copy built with its own
// flags.
#pragma once

#include <cstddef>

namespace zipcache::format {

inline constexpr std::size_t kLanesPerGroup = 16;
inline constexpr std::size_t kGroupWordBytes = kLanesPerGroup * 4;  // one word of a lane group

// Inner positions that one 32-bit word of a p-bit plane holds.
[[gnu::always_inline]] constexpr std::size_t positions_per_word(int plane_bits) {
  return 32 / static_cast<std::size_t>(plane_bits);
}
[[gnu::always_inline]] constexpr std::size_t plane_words(int plane_bits, std::size_t inner) {
  return (inner + positions_per_word(plane_bits) - 1) / positions_per_word(plane_bits);
}
[[gnu::always_inline]] constexpr bool is_code_width(int bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

// Words per lane group of all planes of a `bits`-wide matrix. REQUIRES: is_code_width(bits).
[[gnu::always_inline]] constexpr std::size_t group_words(int bits, std::size_t inner) {
  return bits == 3 ? plane_words(2, inner) + plane_words(1, inner) : plane_words(bits, inner);
}
[[gnu::always_inline]] constexpr std::size_t group_count(std::size_t lanes) {
  return (lanes + kLanesPerGroup - 1) / kLanesPerGroup;
}
[[gnu::always_inline]] constexpr std::size_t matrix_bytes(int bits, std::size_t lanes,
                                                          std::size_t inner) {
  return group_count(lanes) * group_words(bits, inner) * kGroupWordBytes;
}
// Inner positions that a product over the matrix touches: callers pad their operand with zeros up
// to here. A multiple of 32 for 3-bit codes, of 32/bits otherwise.
[[gnu::always_inline]] constexpr std::size_t padded_inner(int bits, std::size_t inner) {
  const std::size_t unit = bits == 3 ? 32 : positions_per_word(bits);
  return (inner + unit - 1) / unit * unit;
}

}  // namespace zipcache::format
