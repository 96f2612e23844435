// IEEE 754 binary16 ("fp16"), kept as its bits. Conversions are exact or round to nearest, half to
// even, and agree bit for bit with F16C on every input but NaN payloads.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace zipcache {

using Half = std::uint16_t;

inline float half_to_float(Half h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu;
  const std::uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0x1f) {  // infinity or NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  }
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline Half float_to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<Half>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<Half>(sign | 0x7e00u);  // NaN
  }
  if (magnitude >= 0x477ff000u) {
    return static_cast<Half>(sign | 0x7c00u);  // rounds to 65536 or more: infinity
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 aligns the bits at 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<Half>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<Half>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

// half_to_float of n elements, without a branch, so that it becomes vector code. Exact, subnormals
// included.
inline void halves_to_floats(const Half* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) {
    const auto sign = static_cast<std::uint32_t>(from[i] & 0x8000u) << 16;
    const auto bits = static_cast<std::uint32_t>(from[i] & 0x7fffu) << 13;
    const auto finite = std::bit_cast<std::uint32_t>(std::bit_cast<float>(bits) * 0x1p112f);
    // Infinity or NaN. A mask, not a choice: the compiler would branch around the product.
    const std::uint32_t special = bits >= 0x0f800000u ? ~0u : 0u;
    to[i] = std::bit_cast<float>(sign | finite | (special & 0x7f800000u));
  }
}

// The value after a trip through fp16.
inline float round_to_half(float value) { return half_to_float(float_to_half(value)); }

}  // namespace zipcache
