// The functions behind the scalar table; contracts in kernels/table.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/table.h"

namespace zipcache::kernels::scalar {

void matmul(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows, float* y,
            std::size_t y_stride, Scratch scratch);
void mask(float* s, std::size_t n, const std::uint64_t* visible);
float max(const float* s, std::size_t n);
float exp2_sum(float* s, std::size_t n, float m);
void axpby(float* y, std::size_t n, float a, const float* x, float b);
void multiply(float* y, const float* x, const float* w, std::size_t n);
float dot(const float* x, const float* w, std::size_t n);

}  // namespace zipcache::kernels::scalar
