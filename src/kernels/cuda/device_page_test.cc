// The positions of device_page.h: no two codes share a bit, no bit is unused, what is written is
// read.
#include "kernels/cuda/device_page.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/philox.h"
#include "kernels/cuda/host_page.h"

namespace zipcache::cuda {
namespace {

constexpr int kWidths[] = {2, 3, 4, 8};
constexpr int kHeadDims[] = {64, 128, 256};

// Marks the bits of a field; false if one was taken or lies outside [begin, end).
bool take(std::vector<std::uint32_t>& words, const BitField& field, int begin, int end) {
  if (field.bits == 0) {
    return true;
  }
  const std::uint32_t mask = ((1u << field.bits) - 1) << field.shift;
  const bool ok = field.offset >= begin && field.offset + 4 <= end && field.offset % 4 == 0 &&
                  field.shift + field.bits <= 32 && (words[field.offset / 4] & mask) == 0;
  if (ok) {
    words[field.offset / 4] |= mask;
  }
  return ok;
}

// All pairs of widths, and wide channels beside every narrower width.
std::vector<PageClass> every_class(int head_dim) {
  std::vector<PageClass> classes;
  for (const std::uint8_t key_bits : kWidths) {
    for (const std::uint8_t value_bits : kWidths) {
      classes.push_back({key_bits, value_bits});
      for (int chunks = 1; chunks < head_dim / kChunkChannels; ++chunks) {
        for (const std::uint8_t wide_bits : kWidths) {
          classes.push_back({key_bits, value_bits, static_cast<std::uint8_t>(chunks), wide_bits});
        }
      }
    }
  }
  return classes;
}

TEST(DevicePage, CodesTileTheirPlanes) {
  for (const int head_dim : kHeadDims) {
    for (const PageClass cls : every_class(head_dim)) {
      const int v = tile_value_offset(head_dim, cls);
      const int end = tile_param_offset(head_dim, cls);
      ASSERT_EQ(tile_bytes(head_dim, cls) % kTileAlignment, 0);
      std::vector<std::uint32_t> words(end / 4);
      for (int token = 0; token < kTileTokens; ++token) {
        for (int channel = 0; channel < head_dim; ++channel) {
          const CodePosition k = key_position(head_dim, cls, token, channel);
          CodePosition x = value_position(head_dim, cls.value_bits, token, channel);
          x.low.offset += v;
          x.high.offset += v;
          ASSERT_TRUE(take(words, k.low, 0, v) && take(words, k.high, 0, v));
          ASSERT_TRUE(take(words, x.low, v, end) && take(words, x.high, v, end));
          ASSERT_EQ(k.low.bits + k.high.bits, cls.chunk_bits(channel / kChunkChannels));
          ASSERT_EQ(x.low.bits + x.high.bits, cls.value_bits);
        }
      }
      for (const std::uint32_t word : words) {
        ASSERT_EQ(word, 0xffffffffu);
      }
    }
  }
}

TEST(DevicePage, ParametersHavePlacesOfTheirOwn) {
  std::vector<int> taken(2 * kTileTokens);
  for (int token = 0; token < kTileTokens; ++token) {
    ++taken[scale_index(token)];
    ++taken[zero_index(token)];
  }
  EXPECT_EQ(taken, std::vector<int>(2 * kTileTokens, 1));
}

TEST(DevicePage, ReadsWhatWasWritten) {
  for (const int head_dim : kHeadDims) {
    for (const PageClass cls : {PageClass{2, 8}, PageClass{3, 2}, PageClass{4, 3}, PageClass{8, 4},
                                PageClass{2, 3, 1, 4}, PageClass{3, 2, 1, 8}}) {
      std::vector<std::byte> bytes(page_bytes(head_dim, cls));
      HostPage page(bytes, head_dim, cls);
      for (const bool write : {true, false}) {
        Philox random(7, 0, 0);
        for (int token = 0; token < kPageTokens; ++token) {
          for (int channel = 0; channel < head_dim; ++channel) {
            const int k =
                static_cast<int>(random.below(1u << cls.chunk_bits(channel / kChunkChannels)));
            const int v = static_cast<int>(random.below(1u << cls.value_bits));
            if (write) {
              page.set_key_code(token, channel, k);
              page.set_value_code(token, channel, v);
            } else {
              ASSERT_EQ(page.key_code(token, channel), k);
              ASSERT_EQ(page.value_code(token, channel), v);
            }
          }
          // Of the range that packers keep to.
          const auto upto = [&](float most) {
            return float_to_half(most * static_cast<float>(1 + random.below(1000)) / 1000);
          };
          const Half scale = upto(127), zero = upto(5000);
          if (write) {
            page.set_scale_zero(token, scale, zero);
          } else {
            ASSERT_EQ(page.scale(token), scale);
            ASSERT_EQ(page.zero(token), zero);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace zipcache::cuda
