// The saliency metrics of the paper (section 4.2, 4.3) on a given matrix of attention weights
// A [n_rows][n_tokens]. `visible` has A's shape and says which tokens a row may see: the count of
// an Eq. 8 denominator is a count of visible places, never a test for zero. `rows` lists the rows
// to use (the probes; a row may be listed twice and then counts twice).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace zipcache::ref {

// Eq. 7: p_i = sum_k A[k, i].
std::vector<double> accumulated_scores(std::span<const double> a, std::size_t n_tokens,
                                       std::span<const std::size_t> rows);

// Eq. 8 (all rows) and Eq. 9 (probe rows): p~_i = sum_k A[k, i] / #{k: k sees i}; 0 if none does.
std::vector<double> normalized_scores(std::span<const double> a,
                                      std::span<const std::uint8_t> visible, std::size_t n_tokens,
                                      std::span<const std::size_t> rows);

// The published code's normaliser: the sum over probe rows divided by n_tokens - i.
std::vector<double> official_scores(std::span<const double> a, std::size_t n_tokens,
                                    std::span<const std::size_t> rows);

// RoCo (arXiv 2402.06262), tokens from the least to the most important: MAS = S / n and sigma =
// sqrt(SS / n - MAS^2) over the rows that see a token; the floor(0.3 n_tokens) of largest sigma are
// above all others; MAS decides within each part.
std::vector<std::size_t> roco_ranking(std::span<const double> a,
                                      std::span<const std::uint8_t> visible, std::size_t n_tokens,
                                      std::span<const std::size_t> rows);

}  // namespace zipcache::ref
