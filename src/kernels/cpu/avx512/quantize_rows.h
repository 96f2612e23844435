// Rows of x as 16-bit fixed point, in the order in which vpdpbusd wants them.
//
// A row is X = round(x * A) with A = 32639 / max|x|, so |X| <= 32639 = 127 * 256 + 127 and
// X = 256 * H + L with H and L in signed bytes. The bytes of 4 consecutive inner positions are one
// 32-bit broadcast; memory holds, for positions 4q .. 4q+3, [L0 L1 L2 L3 H0 H1 H2 H3] at 8q. A row
// is padded with zeros to 32 positions (64 bytes).
#pragma once

#include "kernels/cpu/avx512/isa.h"

namespace zipcache::kernels::avx512 {

struct QuantizedRows {
  const char* bytes = nullptr;
  std::size_t row_bytes = 0;
  const float* steps = nullptr;  // [row]: 1 / A, NaN for a row that holds NaN or infinity
  char* end = nullptr;           // the scratch behind the rows
};

// Quantizes one row and returns its step.
[[gnu::always_inline]] inline float quantize_row(const float* x, std::size_t n, char* out) {
  // As integers, magnitudes sort like the numbers, with infinity and NaN above all others.
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7fffffff);
  __m512i top = _mm512_setzero_si512();
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude_bits));
  }
  if (i < n) {
    const __m512i tail = _mm512_maskz_loadu_epi32(lane_mask(n - i), x + i);
    top = _mm512_max_epu32(top, _mm512_and_si512(tail, magnitude_bits));
  }
  const std::uint32_t top_bits = _mm512_reduce_max_epu32(top);
  const bool finite = top_bits < 0x7f800000u;

  // The cap keeps A finite for tiny rows (max|x| < 2^-111), which then lose relative precision.
  const float wanted = 32639.0f / __builtin_bit_cast(float, top_bits);
  const float a = !finite ? 0.0f : wanted < 0x1p126f ? wanted : 0x1p126f;

  // One FMA scales, rounds to nearest even and adds the 128 that makes byte 1 of the sum equal to H
  // and byte 0 equal to L + 128: the low mantissa bits of 1.5 * 2^23 + X + 128.
  const __m512 scale = _mm512_set1_ps(a);
  const __m512 magic = _mm512_set1_ps(0x1.8p23f + 128.0f);
  const __m512i low_then_high = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i low_sign = _mm512_set1_epi64(0x80808080);
  for (i = 0; i < n; i += 32) {
    const std::size_t left = n - i;
    const __m512 first =
        left >= 16 ? _mm512_loadu_ps(x + i) : _mm512_maskz_loadu_ps(lane_mask(left), x + i);
    const __m512 second = left >= 32   ? _mm512_loadu_ps(x + i + 16)
                          : left >= 16 ? _mm512_maskz_loadu_ps(lane_mask(left - 16), x + i + 16)
                                       : _mm512_setzero_ps();
    const __m512i first_bytes = _mm512_shuffle_epi8(
        _mm512_castps_si512(_mm512_fmadd_ps(first, scale, magic)), low_then_high);
    const __m512i second_bytes = _mm512_shuffle_epi8(
        _mm512_castps_si512(_mm512_fmadd_ps(second, scale, magic)), low_then_high);
    const __m512i both =
        _mm512_permutexvar_epi64(in_order, _mm512_unpacklo_epi64(first_bytes, second_bytes));
    _mm512_store_si512(out + i * 2, _mm512_xor_si512(both, low_sign));
  }
  return finite ? 1.0f / a : __builtin_nanf("");
}

// Quantizes all rows into scratch: the steps first, then the rows.
[[gnu::always_inline]] inline QuantizedRows quantize_rows(const float* x, std::size_t x_stride,
                                                          std::size_t n_rows, std::size_t inner,
                                                          Scratch scratch) {
  auto* const steps = static_cast<float*>(scratch.data);
  char* const bytes = static_cast<char*>(scratch.data) + (n_rows + 15) / 16 * 64;
  const std::size_t row_bytes = (inner + 31) / 32 * 64;
  for (std::size_t row = 0; row < n_rows; ++row) {
    steps[row] = quantize_row(x + row * x_stride, inner, bytes + row * row_bytes);
  }
  return {bytes, row_bytes, steps, bytes + n_rows * row_bytes};
}

}  // namespace zipcache::kernels::avx512
