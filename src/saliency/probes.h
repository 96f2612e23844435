// Which query rows of a prefill chunk act as probes (paper section 4.3, method section 3).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace zipcache::saliency {

enum class ProbeRule : std::uint8_t {
  kDefault,   // ceil(L/20) newest + floor(L/20) random others without replacement, at least 32 in
              // all (both halves raised), all rows when L <= 64
  kOfficial,  // L - int(L - .05 L) newest (at least 1) + int(.05 L) random with replacement
              // (duplicates count twice); none random when L < 20
  kAll,       // every row
  kRecent,    // as kDefault, newest rows only (10 %)
  kRandom,    // as kDefault, random rows only (10 %)
  kLast,      // the last row only
  kSpecial,   // rows at given positions of the sequence (special tokens, punctuation, ...)
};

struct ProbeKey {
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;
  std::uint32_t ordinal = 0;  // tokens of the sequence before this chunk: makes chunks differ
  std::span<const std::uint32_t> special{};  // kSpecial: ascending positions in the sequence
};

// Ascending row indices in [0, n_rows) (kOfficial: with repetitions). Deterministic in its
// arguments. Empty for n_rows == 0.
std::vector<std::uint32_t> select_probes(ProbeRule rule, std::uint32_t n_rows, const ProbeKey& key);
// The same into memory that is used again.
void select_probes(ProbeRule rule, std::uint32_t n_rows, const ProbeKey& key,
                   std::vector<std::uint32_t>* chosen);

}  // namespace zipcache::saliency
