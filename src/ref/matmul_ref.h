// The formulas behind the compute kernels, in double, one obvious loop each.
#pragma once

#include <cstddef>
#include <vector>

namespace zipcache::ref {

// A matrix [inner][lanes]: packed codes (bits 2, 3, 4, 8, the rule in format/code_matrix.h) or fp16
// rows (bits 16). Not an owner.
struct Matrix {
  const void* data = nullptr;
  int bits = 16;
  std::size_t lanes = 0;
  std::size_t inner = 0;
  std::size_t half_stride = 0;  // bits == 16 only
};

// m[i][lane]; a code as an unsigned integer.
double matrix_element(const Matrix& m, std::size_t i, std::size_t lane);

// One element of a product, with what error bounds need.
struct Product {
  double value = 0;      // sum_i x[i] * m[i][lane]
  double magnitude = 0;  // sum_i |x[i] * m[i][lane]|
  double weight = 0;     // sum_i |m[i][lane]|
};

// Row-major [n_rows][m.lanes].
std::vector<Product> matmul(const Matrix& m, const float* x, std::size_t x_stride,
                            std::size_t n_rows);

// out[i] = 2^(s[i] - m) with the difference rounded to float, as the kernels take it; 0 where s[i]
// or m is -infinity. Returns the sum.
double exp2_sum(const float* s, std::size_t n, float m, double* out);

}  // namespace zipcache::ref
