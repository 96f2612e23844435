// What the AVX-512 units share. They include only <cstddef>, <cstdint>, <immintrin.h> and headers
// whose contents are constants or always inlined: an ordinary inline function compiled here could
// be the copy that the linker keeps for older processors (tools/check_isa_symbols.sh).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/table.h"

namespace zipcache::kernels::avx512 {

// The functions behind the table; contracts in kernels/table.h.
void matmul_codes(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                  float* y, std::size_t y_stride, Scratch scratch);
void matmul_half(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                 float* y, std::size_t y_stride);
void mask(float* s, std::size_t n, const std::uint64_t* visible);
float max(const float* s, std::size_t n);
float exp2_sum(float* s, std::size_t n, float m);
void axpby(float* y, std::size_t n, float a, const float* x, float b);
void multiply(float* y, const float* x, const float* w, std::size_t n);
float dot(const float* x, const float* w, std::size_t n);

// Lanes of a 16-lane vector that are left when `n` elements remain.
[[gnu::always_inline]] inline __mmask16 lane_mask(std::size_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1u);
}

}  // namespace zipcache::kernels::avx512
