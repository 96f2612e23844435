#include "quant/byte_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "ref/quant_ref.h"

namespace zipcache::quant {
namespace {

std::vector<float> random_row(std::size_t n, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> row(n);
  for (float& x : row) {
    x = scale * normal(random);
  }
  return row;
}

TEST(ByteRows, AreTheReferences) {
  for (const std::size_t n : {16u, 48u, 64u, 512u}) {
    for (const float magnitude : {1e-6f, 1e-3f, 1.0f, 300.0f, 10000.0f}) {
      SCOPED_TRACE(testing::Message() << n << " of " << magnitude);
      const std::vector<float> x = random_row(n, magnitude, static_cast<unsigned>(n));
      const ref::Quantized expected = ref::byte_rows(std::vector<double>(x.begin(), x.end()), 1, n);
      for (const std::size_t stride : {1u, 4u, 31u}) {
        std::vector<std::uint8_t> codes(n * stride, 77);
        const Half scale = encode_byte_row(x, codes.data(), stride);
        EXPECT_EQ(half_to_float(scale), static_cast<float>(expected.params[0].scale));
        for (std::size_t c = 0; c < n; ++c) {
          // A tie of the quotient may fall either way in float.
          ASSERT_NEAR(codes[c * stride], expected.codes[c], magnitude < 1e-3f ? 0 : 1) << c;
          ASSERT_NEAR(decode_byte(half_to_float(scale), codes[c * stride]), x[c],
                      0.5001 * half_to_float(scale));
          for (std::size_t gap = 1; gap < stride; ++gap) {
            ASSERT_EQ(codes[c * stride + gap], 77);
          }
        }
      }
    }
  }
}

TEST(ByteRows, EncodingWhatTheyStandForChangesNothing) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    const std::vector<float> x =
        random_row(64, std::exp2(static_cast<float>(seed % 20) - 10), seed);
    std::vector<std::uint8_t> codes(64), again(64);
    const Half scale = encode_byte_row(x, codes.data(), 1);
    std::vector<float> decoded(64);
    for (std::size_t c = 0; c < 64; ++c) {
      decoded[c] = decode_byte(half_to_float(scale), codes[c]);
    }
    EXPECT_EQ(encode_byte_row(decoded, again.data(), 1), scale);
    EXPECT_EQ(again, codes);
  }
}

TEST(ByteRows, HoldNoNanAndNoInfinity) {
  std::vector<float> x(16, 0.0f);
  std::vector<std::uint8_t> codes(16);
  EXPECT_EQ(encode_byte_row(x, codes.data(), 1), Half{0});
  EXPECT_EQ(codes, std::vector<std::uint8_t>(16, kByteZero));

  x[3] = NAN;
  x[4] = 2.0f;
  float scale = half_to_float(encode_byte_row(x, codes.data(), 1));
  EXPECT_EQ(codes[3], kByteZero);
  EXPECT_NEAR(decode_byte(scale, codes[4]), 2.0f, 0.01f);

  x[5] = INFINITY;
  x[6] = -INFINITY;
  x[7] = 1e30f;
  scale = half_to_float(encode_byte_row(x, codes.data(), 1));
  EXPECT_TRUE(std::isfinite(scale));
  EXPECT_NEAR(decode_byte(scale, codes[5]), 65504.0f, 64.0f);
  EXPECT_NEAR(decode_byte(scale, codes[6]), -65504.0f, 64.0f);
  EXPECT_EQ(codes[7], codes[5]);
}

}  // namespace
}  // namespace zipcache::quant
