#include "ref/saliency_ref.h"

#include <algorithm>

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

std::vector<std::size_t> roco_ranking(std::span<const double> a,
                                      std::span<const std::uint8_t> visible, std::size_t n_tokens,
                                      std::span<const std::size_t> rows) {
  std::vector<double> squares(a.begin(), a.end());
  for (double& weight : squares) {
    weight *= weight;
  }
  const std::vector<double> mean = normalized_scores(a, visible, n_tokens, rows);
  std::vector<double> variance = normalized_scores(squares, visible, n_tokens, rows);
  std::vector<std::size_t> order(n_tokens);
  for (std::size_t token = 0; token < n_tokens; ++token) {
    variance[token] -= mean[token] * mean[token];
    order[token] = token;
  }
  const auto less_by = [](const std::vector<double>& key) {
    return [&key](std::size_t left, std::size_t right) { return key[left] < key[right]; };
  };
  std::sort(order.begin(), order.end(), less_by(variance));
  const auto protect = order.end() - static_cast<std::ptrdiff_t>(n_tokens * 3 / 10);
  std::sort(order.begin(), protect, less_by(mean));
  std::sort(protect, order.end(), less_by(mean));
  return order;
}

}  // namespace zipcache::ref
