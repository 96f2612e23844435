// Seeded keys, values and queries that look like a model's: every (head, channel) of keys has a
// scale and an offset of its own, a few of them large; values differ in scale from token to token.
// Never zeros: those would flatter both sides.
#pragma once

#include <cstdint>
#include <vector>

namespace zipcache::bench {

class RandomRows {
 public:
  explicit RandomRows(std::uint64_t seed) : seed_(seed) {}

  enum class Kind : std::uint32_t { kKey, kValue, kQuery };
  // Rows [first, first + n) of [n_tokens, width] floats; the same whatever the cut.
  std::vector<float> make(Kind kind, std::uint32_t first, std::uint32_t n,
                          std::uint32_t width) const;

 private:
  std::uint64_t seed_;
};

}  // namespace zipcache::bench
