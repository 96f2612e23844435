// The low-rank approximation of GEAR (arXiv 2403.05527) as its algorithm, in double.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace zipcache::ref {

// Row-major [rows][columns] Q P^T after `loops` times Q = X P, P = X^T Q, with the columns of P and
// of Q made orthonormal (Gram-Schmidt) in the last loop. start: P as [rank][columns].
std::vector<double> power_iteration(std::span<const double> x, std::size_t rows,
                                    std::size_t columns, std::span<const double> start,
                                    std::size_t rank, int loops);

// The elements set aside of a vector: its `count - count / 2` smallest and `count / 2` largest,
// ascending places; ties go to the earlier place.
std::vector<std::size_t> outlier_places(std::span<const double> vector, std::size_t count);

}  // namespace zipcache::ref
