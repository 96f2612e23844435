#include "saliency/ranking.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/philox.h"

namespace zipcache::saliency {
namespace {

constexpr std::uint32_t kWholeBp = 10000;
constexpr std::size_t kRocoProtectedBp = 3000;
constexpr std::uint32_t kRandomScoreStream = 0xffffffffu;  // no layer: apart from the probes' draws

float ratio_or_zero(float mass, std::uint32_t count) {
  return count == 0 ? 0.0f : mass / static_cast<float>(count);
}

// An integer that orders as (score, position) does: NaN below every number, -0 equal to 0.
std::uint64_t order_key(float score, std::uint32_t position) {
  constexpr std::uint32_t kSign = 0x80000000u;
  std::uint32_t rank = 0;
  if (!std::isnan(score)) {
    const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);  // turns -0 into 0
    rank = (bits & kSign) != 0 ? ~bits : bits | kSign;
  }
  return std::uint64_t{rank} << 32 | position;
}

// sqrt(SS / n - MAS^2) orders as its square does.
void roco_scores(const Statistics& tokens, std::span<float> scores) {
  std::vector<std::uint64_t> by_variance(scores.size());
  float highest_mean = 0.0f;
  for (std::size_t token = 0; token < scores.size(); ++token) {
    const float mean = ratio_or_zero(tokens.mass[token], tokens.seen[token]);
    const float variance = ratio_or_zero(tokens.squares[token], tokens.seen[token]) - mean * mean;
    by_variance[token] = order_key(variance, static_cast<std::uint32_t>(token));
    scores[token] = mean;
    highest_mean = std::max(highest_mean, mean);
  }
  const std::size_t n_protected = scores.size() * kRocoProtectedBp / kWholeBp;
  const auto end = by_variance.begin() + static_cast<std::ptrdiff_t>(n_protected);
  if (n_protected < scores.size()) {
    std::nth_element(by_variance.begin(), end, by_variance.end(), std::greater<>());
  }
  for (auto key = by_variance.begin(); key != end; ++key) {
    scores[*key & 0xffffffffu] += 2.0f * highest_mean + 1.0f;  // above every token that is not
  }
}

}  // namespace

void token_scores(Metric metric, const Statistics& tokens, std::uint64_t seed,
                  std::span<float> scores) {
  const std::size_t n_tokens = scores.size();
  const auto& [mass, squares, seen, ages] = tokens;
  switch (metric) {
    case Metric::kNormalized:
      ZC_CHECK(mass.size() == n_tokens && seen.size() == n_tokens);
      for (std::size_t token = 0; token < n_tokens; ++token) {
        scores[token] = ratio_or_zero(mass[token], seen[token]);
      }
      return;
    case Metric::kAccumulated:
    case Metric::kLastToken:
      ZC_CHECK(mass.size() == n_tokens && seen.size() == n_tokens);
      for (std::size_t token = 0; token < n_tokens; ++token) {
        scores[token] = seen[token] == 0 ? 0.0f : mass[token];
      }
      return;
    case Metric::kOfficial:
      ZC_CHECK(mass.size() == n_tokens && seen.size() == n_tokens && ages.size() == n_tokens);
      for (std::size_t token = 0; token < n_tokens; ++token) {
        scores[token] = seen[token] == 0 ? 0.0f : ratio_or_zero(mass[token], ages[token]);
      }
      return;
    case Metric::kRandom: {
      Philox random(seed, kRandomScoreStream, 0);
      for (float& score : scores) {
        score = static_cast<float>(random.next() >> 8) * 0x1p-24f;
      }
      return;
    }
    case Metric::kRoco:
      ZC_CHECK(mass.size() == n_tokens && squares.size() == n_tokens && seen.size() == n_tokens);
      roco_scores(tokens, scores);
      return;
    case Metric::kLocality:
      ZC_CHECK(ages.size() == n_tokens);
      for (std::size_t token = 0; token < n_tokens; ++token) {
        scores[token] = -static_cast<float>(ages[token]);
      }
      return;
  }
  ZC_CHECK(false);  // not a metric
}

std::uint32_t salient_tokens(std::uint32_t n_tokens, std::uint32_t ratio_bp,
                             std::uint32_t multiple) {
  ZC_CHECK(ratio_bp <= kWholeBp && multiple >= 1);
  const auto n_lo =
      static_cast<std::uint32_t>(std::uint64_t{n_tokens} * (kWholeBp - ratio_bp) / kWholeBp);
  const std::uint32_t n_hi = n_tokens - n_lo;
  if (n_lo == 0) {
    return n_hi;  // "all salient" stays all, whatever the multiple
  }
  const std::uint64_t rounded = (std::uint64_t{n_hi} + multiple / 2) / multiple * multiple;
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(rounded, n_tokens));
}

void assign_tiers(std::span<const float> scores, std::span<const std::uint32_t> tier_tokens,
                  std::span<std::uint8_t> tiers) {
  ZC_CHECK(tiers.size() == scores.size() && tier_tokens.size() <= 256);
  ZC_CHECK(std::accumulate(tier_tokens.begin(), tier_tokens.end(), std::uint64_t{0}) ==
           scores.size());

  std::vector<std::uint64_t> keys(scores.size());
  for (std::size_t token = 0; token < scores.size(); ++token) {
    keys[token] = order_key(scores[token], static_cast<std::uint32_t>(token));
  }
  auto begin = keys.begin();
  for (std::size_t tier = 0; tier < tier_tokens.size(); ++tier) {
    const auto end = begin + tier_tokens[tier];
    if (end != keys.end()) {  // the highest keys first; keys are unique, so the set is too
      std::nth_element(begin, end, keys.end(), std::greater<>());
    }
    for (; begin != end; ++begin) {
      tiers[*begin & 0xffffffffu] = static_cast<std::uint8_t>(tier);
    }
  }
}

}  // namespace zipcache::saliency
