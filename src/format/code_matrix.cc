// Packing works on words of four codes. The layout puts inner position 4 * j + byte of a p-bit
// plane at bit 8 * byte + p * j of its word, so four neighbouring codes, read as one little-endian
// u32, are in place after a shift by p * j.

#include "format/code_matrix.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "base/check.h"

namespace zipcache::format {
namespace {

static_assert(std::endian::native == std::endian::little, "packed words are little endian");
static_assert(kGroupWordBytes == 64);
static_assert(matrix_bytes(3, 17, 33) == 2 * (3 + 2) * kGroupWordBytes);

// A plane holds bits [kShift, kShift + kBits) of each code.
template <int kBits, int kShift = 0>
struct Plane {
  static constexpr std::size_t kPositions = positions_per_word(kBits);
  static constexpr std::size_t kFours = kPositions / 4;
  static constexpr std::uint32_t kMask = 0x01010101u * ((1u << kBits) - 1);

  static std::uint32_t pack_word(const std::uint8_t* codes) {
    std::uint32_t word = 0;
    for (std::size_t four = 0; four < kFours; ++four) {
      std::uint32_t bytes;
      std::memcpy(&bytes, codes + 4 * four, 4);
      word |= (bytes >> kShift & kMask) << (kBits * four);
    }
    return word;
  }

  // Adds (ORs) this plane's bits to the codes.
  static void unpack_word(std::uint32_t word, std::uint8_t* codes) {
    for (std::size_t four = 0; four < kFours; ++four) {
      std::uint32_t bytes;
      std::memcpy(&bytes, codes + 4 * four, 4);
      bytes |= (word >> (kBits * four) & kMask) << kShift;
      std::memcpy(codes + 4 * four, &bytes, 4);
    }
  }

  static std::byte* word_at(std::byte* plane, std::size_t word, std::size_t lane) {
    return plane + word * kGroupWordBytes + lane * 4;
  }

  // One lane's codes into one lane group's plane.
  static void pack_lane(std::span<const std::uint8_t> codes, std::size_t lane, std::byte* plane) {
    const std::size_t whole = codes.size() / kPositions;
    for (std::size_t w = 0; w < whole; ++w) {
      const std::uint32_t word = pack_word(&codes[w * kPositions]);
      std::memcpy(word_at(plane, w, lane), &word, 4);
    }
    if (const auto tail = codes.subspan(whole * kPositions); !tail.empty()) {
      std::array<std::uint8_t, kPositions> padded{};
      std::copy(tail.begin(), tail.end(), padded.begin());
      const std::uint32_t word = pack_word(padded.data());
      std::memcpy(word_at(plane, whole, lane), &word, 4);
    }
  }

  static void unpack_lane(const std::byte* plane, std::size_t lane, std::span<std::uint8_t> codes) {
    const auto read = [&](std::size_t w) {
      std::uint32_t word;
      std::memcpy(&word, plane + w * kGroupWordBytes + lane * 4, 4);
      return word;
    };
    const std::size_t whole = codes.size() / kPositions;
    for (std::size_t w = 0; w < whole; ++w) {
      unpack_word(read(w), &codes[w * kPositions]);
    }
    if (const auto tail = codes.subspan(whole * kPositions); !tail.empty()) {
      std::array<std::uint8_t, kPositions> padded{};
      std::copy(tail.begin(), tail.end(), padded.begin());
      unpack_word(read(whole), padded.data());
      std::copy_n(padded.begin(), tail.size(), tail.begin());
    }
  }
};

// Calls visit(Plane, first byte of the plane in its lane group) for each plane of a code width.
template <typename Visit>
void for_each_plane(int bits, std::size_t inner, Visit visit) {
  switch (bits) {
    case 2:
      return visit(Plane<2>{}, std::size_t{0});
    case 3:
      visit(Plane<2>{}, std::size_t{0});
      return visit(Plane<1, 2>{}, plane_words(2, inner) * kGroupWordBytes);
    case 4:
      return visit(Plane<4>{}, std::size_t{0});
    case 8:
      return visit(Plane<8>{}, std::size_t{0});
    default:
      ZC_CHECK(is_code_width(bits));
  }
}

}  // namespace

void pack_codes(int bits, std::size_t lanes, std::size_t inner, std::span<const std::uint8_t> codes,
                std::span<std::byte> out) {
  ZC_CHECK(is_code_width(bits));
  ZC_CHECK(codes.size() == lanes * inner && out.size() == matrix_bytes(bits, lanes, inner));
  const std::size_t group_bytes = group_words(bits, inner) * kGroupWordBytes;
  if (lanes % kLanesPerGroup != 0) {
    const auto last = out.last(group_bytes);
    std::fill(last.begin(), last.end(), std::byte{0});
  }
  for_each_plane(bits, inner, [&](auto plane, std::size_t first_byte) {
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      std::byte* group = out.data() + lane / kLanesPerGroup * group_bytes;
      plane.pack_lane(codes.subspan(lane * inner, inner), lane % kLanesPerGroup,
                      group + first_byte);
    }
  });
}

void unpack_codes(int bits, std::size_t lanes, std::size_t inner, std::span<const std::byte> packed,
                  std::span<std::uint8_t> codes) {
  ZC_CHECK(is_code_width(bits));
  ZC_CHECK(codes.size() == lanes * inner && packed.size() == matrix_bytes(bits, lanes, inner));
  std::fill(codes.begin(), codes.end(), std::uint8_t{0});
  const std::size_t group_bytes = group_words(bits, inner) * kGroupWordBytes;
  for_each_plane(bits, inner, [&](auto plane, std::size_t first_byte) {
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      const std::byte* group = packed.data() + lane / kLanesPerGroup * group_bytes;
      plane.unpack_lane(group + first_byte, lane % kLanesPerGroup,
                        codes.subspan(lane * inner, inner));
    }
  });
}

}  // namespace zipcache::format
