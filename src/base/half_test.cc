// Conversions against the definition of binary16 and, where the processor has it, against F16C.
#include "base/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "base/philox.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace zipcache {
namespace {

constexpr std::uint32_t kHalves = 1u << 16;

bool is_nan(Half h) { return (h & 0x7fffu) > 0x7c00u; }

// The definition: (-1)^s * 2^(e-15) * 1.m, or 2^-14 * 0.m for e = 0.
double value_of(Half h) {
  const int exponent = h >> 10 & 0x1f;
  const double mantissa = (h & 0x3ff) / 1024.0;
  const double magnitude = exponent == 0x1f ? std::numeric_limits<double>::infinity()
                           : exponent == 0  ? std::ldexp(mantissa, -14)
                                            : std::ldexp(1 + mantissa, exponent - 15);
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

TEST(Half, EveryHalfHasItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < kHalves; ++bits) {
    const auto half = static_cast<Half>(bits);
    if (is_nan(half)) {
      EXPECT_TRUE(std::isnan(half_to_float(half))) << bits;
      EXPECT_TRUE(is_nan(float_to_half(half_to_float(half)))) << bits;
      continue;
    }
    EXPECT_EQ(half_to_float(half), value_of(half)) << bits;
    EXPECT_EQ(std::signbit(half_to_float(half)), (bits & 0x8000) != 0) << bits;
    EXPECT_EQ(float_to_half(half_to_float(half)), half) << bits;
  }
}

// Between neighbouring halves: below the middle down, above it up, in the middle to the even one.
// 65520 is the middle between the largest finite half and the first value that isn't one.
TEST(Half, RoundsToNearestHalfToEven) {
  for (std::uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const auto below = static_cast<Half>(bits), above = static_cast<Half>(bits + 1);
    const double next = above == 0x7c00 ? 65536.0 : value_of(above);
    const auto middle = static_cast<float>((value_of(below) + next) / 2);
    EXPECT_EQ(float_to_half(middle), bits % 2 == 0 ? below : above) << bits;
    EXPECT_EQ(float_to_half(std::nextafter(middle, 0.0f)), below) << bits;
    EXPECT_EQ(float_to_half(std::nextafter(middle, 1e9f)), above) << bits;
    EXPECT_EQ(float_to_half(-middle), float_to_half(middle) | 0x8000) << bits;
  }
  EXPECT_EQ(float_to_half(std::numeric_limits<float>::max()), 0x7c00);
  EXPECT_EQ(float_to_half(std::numeric_limits<float>::denorm_min()), 0);
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) float f16c_to_float(Half h) { return _cvtsh_ss(h); }
__attribute__((target("f16c"))) Half f16c_to_half(float f) {
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
}

TEST(Half, AgreesWithF16C) {
  // Every processor with AVX2 has F16C, which older compilers can't ask for by name.
  if (!__builtin_cpu_supports("avx2")) {
    GTEST_SKIP() << "this processor may have no F16C";
  }
  for (std::uint32_t bits = 0; bits < kHalves; ++bits) {
    const auto half = static_cast<Half>(bits);
    if (!is_nan(half)) {
      EXPECT_EQ(std::bit_cast<std::uint32_t>(half_to_float(half)),
                std::bit_cast<std::uint32_t>(f16c_to_float(half)));
    }
  }
  Philox random(7, 0, 0);
  for (int draw = 0; draw < 2'000'000; ++draw) {
    std::uint32_t bits = random.next();
    if (draw % 2 == 0) {  // near or inside fp16's range of exponents
      bits = (bits & 0x807fffffu) | ((96 + random.below(54)) << 23);
    }
    const auto value = std::bit_cast<float>(bits);
    if (std::isnan(value)) {
      EXPECT_TRUE(is_nan(float_to_half(value))) << std::hex << bits;
    } else {
      ASSERT_EQ(float_to_half(value), f16c_to_half(value)) << std::hex << bits;
    }
  }
}
#endif

TEST(Half, ManyToFloatsAreAsEachAlone) {
  std::vector<Half> halves(0x10000);
  std::iota(halves.begin(), halves.end(), Half{0});
  std::vector<float> floats(halves.size());
  halves_to_floats(halves.data(), halves.size(), floats.data());
  for (std::size_t i = 0; i < halves.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(floats[i]),
              std::bit_cast<std::uint32_t>(half_to_float(halves[i])))
        << "half " << i;
  }
}

}  // namespace
}  // namespace zipcache
