// docs/formats.md shows the bytes that this build writes. On failure the right text is printed:
// paste it, after checking that the change of format was meant.

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "quant/codec_test_util.h"

namespace zipcache::quant {
namespace {

// Lines of 16 bytes; `*` stands for lines of zeros.
std::string hex_dump(std::span<const std::byte> bytes) {
  std::string out;
  bool in_zeros = false;
  for (std::size_t at = 0; at < bytes.size(); at += 16) {
    const auto line = bytes.subspan(at, std::min<std::size_t>(16, bytes.size() - at));
    if (std::all_of(line.begin(), line.end(), [](std::byte b) { return b == std::byte{0}; })) {
      out += in_zeros ? "" : "*\n";
      in_zeros = true;
      continue;
    }
    in_zeros = false;
    char text[24];
    std::snprintf(text, sizeof text, "%04zx ", at);
    out += text;
    for (const std::byte b : line) {
      std::snprintf(text, sizeof text, " %02x", std::to_integer<unsigned>(b));
      out += text;
    }
    out += "\n";
  }
  return out;
}

// The code block that follows the marker of that name.
std::string documented(const std::string& name) {
  std::ifstream file(ZIPCACHE_FORMATS_MD);
  std::stringstream text;
  text << file.rdbuf();
  const std::string page = text.str(), fence = "```\n";
  const std::size_t marker = page.find("<!-- formats_doc_test: " + name + " -->");
  if (marker == std::string::npos) {
    return "no marker for " + name;
  }
  const std::size_t begin = page.find(fence, marker) + fence.size();
  return page.substr(begin, page.find(fence, begin) - begin);
}

TEST(FormatsDoc, ShowsTheCodeMatrix) {
  const std::vector<std::uint8_t> codes{0, 1, 2, 3, 4, 5, 6, 7, 0, 1};
  std::vector<std::byte> packed(format::matrix_bytes(3, 2, 5), std::byte{0xcd});
  format::pack_codes(3, 2, 5, codes, packed);
  EXPECT_EQ(documented("matrix"), hex_dump(packed));
}

TEST(FormatsDoc, ShowsTheBlock) {
  CodecCase c;
  c.shape = {4, 1, 16, 16, {}, {}};
  c.shape.key.n_classes = 2;
  c.shape.key.class0_tokens = 2;
  c.shape.value.granularity = Granularity::kChannelSeparable;
  c.shape.value.token_params = TokenParams::kByte;
  c.shape.value.bits = {3, 3};
  c.tiers = {1, 0, 1, 0};
  for (int token = 0; token < 4; ++token) {
    for (int channel = 0; channel < 16; ++channel) {
      c.keys.push_back(static_cast<float>((token + 1) * (channel + 1)) / 4);
      c.values.push_back(static_cast<float>((token + 1) * (channel - 8)) / 4);
    }
  }
  const Encoded e(c);
  EXPECT_EQ(documented("block"), hex_dump(e.bytes()));

  const BlockLayout& l = e.layout();
  EXPECT_EQ(l.codes(Tensor::kKey, 0, 1, 0), 0x080u) << "the table of offsets in the page";
  EXPECT_EQ(l.codes(Tensor::kValue, 0, 0, 0), 0x0c0u);
  EXPECT_EQ(l.channel_scale_min(Tensor::kKey, 0, 0), 0x140u);
  EXPECT_EQ(l.channel_scale_min(Tensor::kKey, 0, 1), 0x180u);
  EXPECT_EQ(l.channel_factor(Tensor::kValue, 0, 0), 0x1c0u);
  EXPECT_EQ(l.token_scale_min(Tensor::kValue, 0, 0), 0x1e0u);
  EXPECT_EQ(l.token_base(Tensor::kValue, 0), 0x1e8u);
  EXPECT_EQ(l.tier_plane(0, 0), 0x200u);
}

}  // namespace
}  // namespace zipcache::quant
