// Rows of x as 16-bit fixed point, in the order in which vpmaddwd wants them.
//
// A row is X = round(x * A) with A = 32639 / max|x| (the bound of the AVX-512 kernel, so that both
// have the same accuracy). The codes of 4 consecutive positions are the bytes of one word; masking
// out every other byte leaves positions 0 and 2, or 1 and 3, as pairs of 16-bit integers. So memory
// holds, for positions 4q .. 4q+3, [X0 X2 X1 X3] at 8q. A row is padded with zeros to 32 positions.
#pragma once

#include "kernels/cpu/avx2/isa.h"

namespace zipcache::kernels::avx2 {

struct QuantizedRows {
  const char* bytes = nullptr;
  std::size_t row_bytes = 0;
  const float* steps = nullptr;  // [row]: 1 / A, NaN for a row that holds NaN or infinity
  char* end = nullptr;           // the scratch behind the rows
};

// x[i .. i+7], zero from position n on.
[[gnu::always_inline]] inline __m256 load_to(const float* x, std::size_t i, std::size_t n) {
  return i + 8 <= n ? _mm256_loadu_ps(x + i)
         : i < n    ? _mm256_maskload_ps(x + i, lane_mask(n - i))
                    : _mm256_setzero_ps();
}

// Quantizes one row and returns its step.
[[gnu::always_inline]] inline float quantize_row(const float* x, std::size_t n, char* out) {
  // As integers, magnitudes sort like the numbers, with infinity and NaN above all others.
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  for (std::size_t i = 0; i < n; i += 8) {
    const __m256i bits = _mm256_castps_si256(load_to(x, i, n));
    top = _mm256_max_epu32(top, _mm256_and_si256(bits, magnitude_bits));
  }
  __m128i top4 = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  top4 = _mm_max_epu32(top4, _mm_shuffle_epi32(top4, 0x4e));
  top4 = _mm_max_epu32(top4, _mm_shuffle_epi32(top4, 0xb1));
  const auto top_bits = static_cast<std::uint32_t>(_mm_cvtsi128_si32(top4));
  const bool finite = top_bits < 0x7f800000u;

  // The cap keeps A finite for tiny rows (max|x| < 2^-111), which then lose relative precision.
  const float wanted = 32639.0f / __builtin_bit_cast(float, top_bits);
  const float a = !finite ? 0.0f : wanted < 0x1p126f ? wanted : 0x1p126f;

  const __m256 scale = _mm256_set1_ps(a);
  const __m256i pair_order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  const std::size_t padded = (n + 31) / 32 * 32;
  for (std::size_t i = 0; i < padded; i += 16) {
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(load_to(x, i, n), scale));
    const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(load_to(x, i + 8, n), scale));
    // Packing keeps 128-bit lanes apart: quads 0 and 2, then 1 and 3.
    const __m256i quads = _mm256_shuffle_epi8(_mm256_packs_epi32(first, second), pair_order);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * 2),
                       _mm256_permute4x64_epi64(quads, 0xd8));
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

}  // namespace zipcache::kernels::avx2
