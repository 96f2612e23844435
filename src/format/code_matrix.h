// The layout of packed codes, the same for keys and values: a matrix of unsigned b-bit codes with
// `lanes` (what a product leaves side by side: tokens of K, channels of V) and `inner` (what a
// product sums over: channels of K, tokens of V). Normative text: docs/formats.md.
//
//   lane group = 16 lanes (one 512-bit vector of 32-bit words); lanes are padded to whole groups.
//   plane      = for each lane group, ceil(inner / (32/p)) words of 16 x u32 little endian, one u32
//                per lane; it holds p bits of 32/p consecutive inner positions.
//   inside a word of a p-bit plane: inner position i = word * (32/p) + 4 * j + byte
//                sits at bit 8 * byte + p * j   (byte = 0..3, j = 0..8/p - 1)
//                so (word >> p*j) & (0x01010101 * (2^p - 1)) gives 4 codes as 4 bytes.
//   2, 4, 8-bit matrix = one plane of that width; 3-bit = for each lane group a 2-bit plane (the
//                low bits) directly followed by a 1-bit plane (the high bit).
//   order in memory: lane group after lane group. Padding lanes and positions hold code 0.
//
// This room owns every bit position: others use pack/unpack, or follow the rule above and are
// tested against them (the kernels).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "format/code_layout.h"

namespace zipcache::format {

// Writes codes[lane * inner + i] (each < 2^bits) as a packed matrix. `out` is matrix_bytes() long
// and is overwritten whole, padding included.
void pack_codes(int bits, std::size_t lanes, std::size_t inner, std::span<const std::uint8_t> codes,
                std::span<std::byte> out);

// The inverse of pack_codes. `codes` is lanes * inner long.
void unpack_codes(int bits, std::size_t lanes, std::size_t inner, std::span<const std::byte> packed,
                  std::span<std::uint8_t> codes);

}  // namespace zipcache::format
