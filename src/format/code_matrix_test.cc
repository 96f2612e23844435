// Packing against the layout rule applied bit by bit.
#include "format/code_matrix.h"

#include <gtest/gtest.h>

#include <tuple>
#include <vector>

#include "base/check.h"
#include "base/philox.h"

namespace zipcache::format {
namespace {

// Bit `bit` of the code at (lane, position) of a p-bit plane that starts at byte `plane`: the rule
// of code_matrix.h, with no word arithmetic shared with the implementation.
struct BitPlace {
  std::size_t byte;
  int bit;
};
BitPlace place(std::size_t plane, int plane_bits, std::size_t lane, std::size_t position, int bit) {
  const std::size_t per_word = 32 / plane_bits;
  const std::size_t in_word = position % per_word;
  const std::size_t bit_of_word = 8 * (in_word % 4) + plane_bits * (in_word / 4) + bit;
  const std::size_t word = plane + position / per_word * 64 + lane % 16 * 4;
  return {word + bit_of_word / 8, static_cast<int>(bit_of_word % 8)};
}

std::vector<std::byte> packed_by_rule(int bits, std::size_t lanes, std::size_t inner,
                                      const std::vector<std::uint8_t>& codes) {
  const auto words = [&](int p) { return (inner * p + 31) / 32; };
  const std::size_t group_bytes = 64 * (bits == 3 ? words(2) + words(1) : words(bits));
  std::vector<std::byte> out((lanes + 15) / 16 * group_bytes);
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    for (std::size_t i = 0; i < inner; ++i) {
      for (int bit = 0; bit < bits; ++bit) {
        const std::size_t group = lane / 16 * group_bytes;
        const BitPlace at = bits != 3 ? place(group, bits, lane, i, bit)
                            : bit < 2 ? place(group, 2, lane, i, bit)
                                      : place(group + 64 * words(2), 1, lane, i, 0);
        out[at.byte] |= static_cast<std::byte>((codes[lane * inner + i] >> bit & 1) << at.bit);
      }
    }
  }
  return out;
}

class CodeMatrix : public ::testing::TestWithParam<std::tuple<int, std::size_t>> {};

TEST_P(CodeMatrix, PacksByTheRuleAndBack) {
  const auto [bits, lanes] = GetParam();
  Philox random(3, static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(lanes));
  for (const std::size_t inner : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 256}) {
    SCOPED_TRACE(::testing::Message() << bits << " bits, " << lanes << " x " << inner);
    std::vector<std::uint8_t> codes(lanes * inner);
    for (auto& code : codes) {
      code = static_cast<std::uint8_t>(random.below(1u << bits));
    }
    const std::vector<std::byte> want = packed_by_rule(bits, lanes, inner, codes);
    ASSERT_EQ(matrix_bytes(bits, lanes, inner), want.size());
    std::vector<std::byte> packed(want.size(), std::byte{0xcd});
    pack_codes(bits, lanes, inner, codes, packed);
    ASSERT_EQ(packed, want);
    std::vector<std::uint8_t> unpacked(codes.size(), 0xcd);
    unpack_codes(bits, lanes, inner, packed, unpacked);
    ASSERT_EQ(unpacked, codes);
  }
}

INSTANTIATE_TEST_SUITE_P(AllWidths, CodeMatrix,
                         ::testing::Combine(::testing::Values(2, 3, 4, 8),
                                            ::testing::Values(0, 1, 15, 16, 17, 31, 32, 33, 64,
                                                              256)));

TEST(CodeMatrix, UnpackIgnoresPadding) {
  std::vector<std::byte> packed(matrix_bytes(3, 5, 7), std::byte{0xff});
  std::vector<std::uint8_t> codes(5 * 7);
  unpack_codes(3, 5, 7, packed, codes);
  EXPECT_EQ(codes, std::vector<std::uint8_t>(5 * 7, 7));
}

TEST(CodeMatrix, PaddedInnerIsWhatTheWordsHold) {
  for (const int bits : {2, 4, 8}) {
    for (std::size_t inner = 0; inner < 100; ++inner) {
      EXPECT_EQ(padded_inner(bits, inner), plane_words(bits, inner) * positions_per_word(bits));
    }
  }
  EXPECT_EQ(padded_inner(3, 33), 64u);
  EXPECT_EQ(padded_inner(3, 32), 32u);
}

TEST(CodeMatrix, RefusesWrongSizesAndWidths) {
  std::vector<std::uint8_t> codes(16);
  std::vector<std::byte> packed(64);
  EXPECT_THROW(pack_codes(5, 1, 16, codes, packed), ContractViolation);
  EXPECT_THROW(pack_codes(2, 1, 17, codes, packed), ContractViolation);
  EXPECT_THROW(unpack_codes(4, 1, 16, packed, codes), ContractViolation);
  EXPECT_NO_THROW(pack_codes(2, 1, 16, codes, packed));
}

}  // namespace
}  // namespace zipcache::format
