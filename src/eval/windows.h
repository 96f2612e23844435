// How a text is cut for perplexity, as llama-perplexity does it: windows of n_ctx tokens side by
// side, the first token of each replaced by BOS where the model wants one, and predictions scored
// in the second half, where every token has context.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/expected.h"

namespace zipcache::eval {

struct Window {
  std::vector<std::int32_t> tokens;  // n_ctx of them
  std::size_t first_scored = 0;      // position i predicts token i + 1

  std::size_t n_scored() const { return tokens.size() - 1 - first_scored; }
  std::int32_t target(std::size_t position) const { return tokens[position + 1]; }
};

// The text from its first window on that has at least `percent` of all windows before it, so that
// what was tuned on the beginning of a text can be judged by the rest. REQUIRES: n_ctx >= 1,
// percent < 100.
std::span<const std::int32_t> skip_windows(std::span<const std::int32_t> tokens, std::size_t n_ctx,
                                           std::uint32_t percent);

// At most `max_windows` (0 = all). `bos` < 0: the model takes none. An error when the text is
// shorter than one window. REQUIRES: n_ctx >= 4.
Expected<std::vector<Window>> cut_windows(std::span<const std::int32_t> tokens, std::size_t n_ctx,
                                          std::size_t max_windows, std::int32_t bos);

}  // namespace zipcache::eval
