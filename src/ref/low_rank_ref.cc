#include "ref/low_rank_ref.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace zipcache::ref {
namespace {

using Vectors = std::vector<std::vector<double>>;

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

void orthonormalize(Vectors& vectors) {
  for (std::size_t r = 0; r < vectors.size(); ++r) {
    for (std::size_t other = 0; other < r; ++other) {
      const double part = dot(vectors[r], vectors[other]);
      for (std::size_t i = 0; i < vectors[r].size(); ++i) {
        vectors[r][i] -= part * vectors[other][i];
      }
    }
    const double length = std::sqrt(dot(vectors[r], vectors[r]));
    for (double& value : vectors[r]) {
      value = length > 0 ? value / length : 0;
    }
  }
}

}  // namespace

std::vector<double> power_iteration(std::span<const double> x, std::size_t rows,
                                    std::size_t columns, std::span<const double> start,
                                    std::size_t rank, int loops) {
  Vectors p(rank), q(rank, std::vector<double>(rows));
  for (std::size_t r = 0; r < rank; ++r) {
    p[r].assign(&start[r * columns], &start[r * columns] + columns);
  }
  for (int loop = 0; loop < loops; ++loop) {
    if (loop == loops - 1) {
      orthonormalize(p);
    }
    for (std::size_t r = 0; r < rank; ++r) {
      for (std::size_t row = 0; row < rows; ++row) {
        q[r][row] = std::inner_product(p[r].begin(), p[r].end(), &x[row * columns], 0.0);
      }
    }
    if (loop == loops - 1) {
      orthonormalize(q);
    }
    for (std::size_t r = 0; r < rank; ++r) {
      for (std::size_t c = 0; c < columns; ++c) {
        p[r][c] = 0;
        for (std::size_t row = 0; row < rows; ++row) {
          p[r][c] += x[row * columns + c] * q[r][row];
        }
      }
    }
  }
  std::vector<double> product(rows * columns);
  for (std::size_t at = 0; at < product.size(); ++at) {
    for (std::size_t r = 0; r < rank; ++r) {
      product[at] += q[r][at / columns] * p[r][at % columns];
    }
  }
  return product;
}

std::vector<std::size_t> outlier_places(std::span<const double> vector, std::size_t count) {
  std::vector<std::size_t> order(vector.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return vector[a] < vector[b]; });
  std::vector<std::size_t> places(order.begin(),
                                  order.begin() + static_cast<std::ptrdiff_t>(count - count / 2));
  places.insert(places.end(), order.end() - static_cast<std::ptrdiff_t>(count / 2), order.end());
  std::sort(places.begin(), places.end());
  return places;
}

}  // namespace zipcache::ref
