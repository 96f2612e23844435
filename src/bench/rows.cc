#include "bench/rows.h"

#include <cmath>

#include "base/philox.h"

namespace zipcache::bench {
namespace {

// Nearly normal, mean 0, deviation 1: the sum of four bytes.
float normal(std::uint32_t bits) {
  const auto byte = [bits](int i) { return static_cast<int>(bits >> (8 * i) & 0xff); };
  return static_cast<float>(byte(0) + byte(1) + byte(2) + byte(3) - 510) / 147.8f;
}

}  // namespace

std::vector<float> RandomRows::make(Kind kind, std::uint32_t first, std::uint32_t n,
                                    std::uint32_t width) const {
  const auto stream = static_cast<std::uint32_t>(kind);
  std::vector<float> scale(width, 1.0f), offset(width, 0.0f);
  Philox channels(seed_, stream, UINT32_MAX);
  for (std::uint32_t c = 0; kind == Kind::kKey && c < width; ++c) {
    const bool is_outlier = channels.below(16) == 0;
    scale[c] = std::exp2(0.5f * normal(channels.next())) * (is_outlier ? 4.0f : 1.0f);
    offset[c] = (is_outlier ? 4.0f : 0.5f) * normal(channels.next());
  }
  std::vector<float> rows(std::size_t{n} * width);
  for (std::uint32_t row = 0; row < n; ++row) {
    Philox random(seed_, stream, first + row);
    const float token = kind == Kind::kValue ? std::exp2(0.5f * normal(random.next())) : 1.0f;
    for (std::uint32_t c = 0; c < width; ++c) {
      rows[std::size_t{row} * width + c] = token * (offset[c] + scale[c] * normal(random.next()));
    }
  }
  return rows;
}

}  // namespace zipcache::bench
