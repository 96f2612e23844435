#include "ref/saliency_ref.h"

namespace zipcache::ref {

std::vector<double> accumulated_scores(std::span<const double> a, std::size_t n_tokens,
                                       std::span<const std::size_t> rows) {
  std::vector<double> scores(n_tokens);
  for (const std::size_t row : rows) {
    for (std::size_t token = 0; token < n_tokens; ++token) {
      scores[token] += a[row * n_tokens + token];
    }
  }
  return scores;
}

std::vector<double> normalized_scores(std::span<const double> a,
                                      std::span<const std::uint8_t> visible, std::size_t n_tokens,
                                      std::span<const std::size_t> rows) {
  std::vector<double> scores = accumulated_scores(a, n_tokens, rows);
  for (std::size_t token = 0; token < n_tokens; ++token) {
    double seen = 0;
    for (const std::size_t row : rows) {
      seen += visible[row * n_tokens + token] != 0 ? 1 : 0;
    }
    scores[token] = seen == 0 ? 0 : scores[token] / seen;
  }
  return scores;
}

std::vector<double> official_scores(std::span<const double> a, std::size_t n_tokens,
                                    std::span<const std::size_t> rows) {
  std::vector<double> scores = accumulated_scores(a, n_tokens, rows);
  for (std::size_t token = 0; token < n_tokens; ++token) {
    scores[token] /= static_cast<double>(n_tokens - token);
  }
  return scores;
}

}  // namespace zipcache::ref
