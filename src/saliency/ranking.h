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
  kLastToken,    // mass, of the last query row that sees the token alone (no sum)
  kRoco,         // the 30 % of the tokens with the largest deviation of their attention first, the
                 // others, and they among themselves, by mean attention (arXiv 2402.06262); the
                 // mean alone is kNormalized with every row as a probe
};

// What is known of the tokens that are to be ranked; spans are as long as there are tokens. Those
// that a metric does not use may be empty: kRandom uses none, kLocality only `ages`.
struct Statistics {
  std::span<const float> mass;          // >= 0, attention of the probe rows, summed
  std::span<const float> squares;       // kRoco: the sum of the squares of each row's attention
  std::span<const std::uint32_t> seen;  // probe rows that could see the token; 0 gives score 0
  std::span<const std::uint32_t> ages;  // tokens of the sequence from it on, itself included
};

// scores[i]: the higher, the more salient. `seed`: for kRandom; the same seed gives the same order,
// so it must differ between layers, heads and blocks.
void token_scores(Metric metric, const Statistics& tokens, std::uint64_t seed,
                  std::span<float> scores);

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
