// From accumulated attention to tiers (paper Eq. 7 to 9; method section 3).
#pragma once

#include <cstdint>
#include <span>

namespace zipcache::saliency {

enum class Metric : std::uint8_t {
  kNormalized,   // mass / number of probe rows that see the token (Eq. 8, 9)
  kAccumulated,  // mass (Eq. 7)
  kOfficial,     // mass / (L - position in the chunk): the published code's normaliser
  kRandom,       // seeded random order
  kLocality,     // newest first
};

// scores[i] from mass[i] >= 0 and seen[i] (probe rows that could see token i; 0 gives score 0).
// `ages[i]`: number of tokens of the sequence after token i, itself included (L - i). Spans that a
// metric does not use may be empty: kRandom uses none of the three, kLocality only `ages`.
// `seed`: for kRandom; the same seed gives the same order, so it must differ between layers, heads
// and blocks.
void scores_from_mass(Metric metric, std::span<const float> mass,
                      std::span<const std::uint32_t> seen, std::span<const std::uint32_t> ages,
                      std::uint64_t seed, std::span<float> scores);

// Tokens of the salient class: ratio in basis points (6000 = 60 %), n_lo = floor((1 - r) n) in
// integers. With multiple > 1 the count of salient tokens is rounded to the nearest multiple (ties
// up) and capped at n, so that code matrices carry no padding; but n_lo == 0 always gives n.
// REQUIRES: ratio_bp <= 10000, multiple >= 1.
std::uint32_t salient_tokens(std::uint32_t n_tokens, std::uint32_t ratio_bp,
                             std::uint32_t multiple);

// tiers[i] for each token: tokens are ordered by (score, position) ascending, as the published code
// does; the highest tier_tokens[0] get tier 0, the next tier_tokens[1] tier 1, and so on. The sum
// of tier_tokens is scores.size(). NaN scores rank lowest.
void assign_tiers(std::span<const float> scores, std::span<const std::uint32_t> tier_tokens,
                  std::span<std::uint8_t> tiers);

}  // namespace zipcache::saliency
