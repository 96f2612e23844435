// A low-rank approximation by power iteration (GEAR, arXiv 2403.05527). Internal to this room.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace zipcache::quant {

// x[token][channel] ~ sum_r token[r][token] * channel[r][channel].
struct LowRank {
  std::vector<float> token;    // [rank][rows], orthonormal
  std::vector<float> channel;  // [rank][columns]
};

// P random; `loops` times: Q = X P, P = X^T Q, both made orthonormal first in the last loop. The
// random start is the same in every call.
LowRank low_rank_factors(std::span<const float> x, std::size_t rows, std::size_t columns,
                         std::size_t rank, int loops);

// The start, [rank][columns], uniform in [0, 1).
std::vector<float> low_rank_start(std::size_t columns, std::size_t rank);

}  // namespace zipcache::quant
