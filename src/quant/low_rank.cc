#include "quant/low_rank.h"

#include <algorithm>
#include <cmath>

#include "base/philox.h"

namespace zipcache::quant {
namespace {

constexpr std::uint64_t kSeed = 0x6c6f7772616e6b;

// Modified Gram-Schmidt over vectors[rank][n]; a vector within the span of the others becomes 0.
void make_orthonormal(std::vector<double>& vectors, std::size_t rank, std::size_t n) {
  constexpr double kNegligible = 1e-9;
  for (std::size_t r = 0; r < rank; ++r) {
    double* v = &vectors[r * n];
    const auto dot = [n](const double* a, const double* b) {
      double sum = 0;
      for (std::size_t i = 0; i < n; ++i) {
        sum += a[i] * b[i];
      }
      return sum;
    };
    const double length = std::sqrt(dot(v, v));
    for (std::size_t other = 0; other < r; ++other) {
      const double* w = &vectors[other * n];
      const double part = dot(v, w);
      for (std::size_t i = 0; i < n; ++i) {
        v[i] -= part * w[i];
      }
    }
    const double rest = std::sqrt(dot(v, v));
    const double scale = rest > kNegligible * length ? 1 / rest : 0;
    for (std::size_t i = 0; i < n; ++i) {
      v[i] *= scale;
    }
  }
}

}  // namespace

std::vector<float> low_rank_start(std::size_t columns, std::size_t rank) {
  Philox random(kSeed, 0, 0);
  std::vector<float> start(columns * rank);
  for (float& x : start) {
    x = static_cast<float>(random.next() >> 8) * 0x1p-24f;
  }
  return start;
}

LowRank low_rank_factors(std::span<const float> x, std::size_t rows, std::size_t columns,
                         std::size_t rank, int loops) {
  const std::vector<float> start = low_rank_start(columns, rank);
  std::vector<double> p(start.begin(), start.end()), q(rank * rows);
  for (int loop = 0; rank > 0 && loop < loops; ++loop) {
    const bool last = loop + 1 == loops;
    if (last) {
      make_orthonormal(p, rank, columns);
    }
    for (std::size_t r = 0; r < rank; ++r) {
      for (std::size_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (std::size_t c = 0; c < columns; ++c) {
          sum += x[row * columns + c] * p[r * columns + c];
        }
        q[r * rows + row] = sum;
      }
    }
    if (last) {
      make_orthonormal(q, rank, rows);
    }
    std::fill(p.begin(), p.end(), 0.0);
    for (std::size_t r = 0; r < rank; ++r) {
      for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t c = 0; c < columns; ++c) {
          p[r * columns + c] += x[row * columns + c] * q[r * rows + row];
        }
      }
    }
  }
  return {{q.begin(), q.end()}, {p.begin(), p.end()}};
}

}  // namespace zipcache::quant
