// Element-wise kernels and reductions over rows of scores.
#include "kernels/cpu/avx2/isa.h"

namespace zipcache::kernels::avx2 {
namespace {

// 2^t, relative error about 1e-7 (polynomial 9.2e-9, the rest rounding). NaN stays NaN; below -150
// (-infinity included) the result is 0, above 128 infinity.
[[gnu::always_inline]] inline __m256 exp2_of(__m256 t) {
  // Operand order keeps NaN: vmaxps and vminps return the second operand if one is NaN.
  t = _mm256_max_ps(_mm256_set1_ps(-200.0f), t);
  t = _mm256_min_ps(_mm256_set1_ps(200.0f), t);
  const __m256 whole = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(t, whole);  // exact, in [-0.5, 0.5]
  // (2^f - 1) / f, degree 5, interpolated at the Chebyshev nodes of [-0.5, 0.5].
  __m256 p = _mm256_set1_ps(0x1.44138ap-13f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.5f089p-10f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.3b2a54p-7f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.c6af6cp-5f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.ebfbep-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0x1.62e43p-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  // 2^whole in two factors, each a normal number, so that subnormal results and 2^128 come out too.
  const __m256i exponent = _mm256_cvtps_epi32(whole);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

[[gnu::always_inline]] inline float sum_of(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

}  // namespace

void mask(float* s, std::size_t n, const std::uint64_t* visible) {
  const __m256 hidden = _mm256_set1_ps(-__builtin_inff());
  const __m256i bit_of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (std::size_t i = 0; i < n; i += 8) {
    const auto bits = static_cast<int>(visible[i / 64] >> i % 64 & 0xff);
    const __m256i is_hidden = _mm256_cmpeq_epi32(
        _mm256_and_si256(_mm256_set1_epi32(bits), bit_of_lane), _mm256_setzero_si256());
    _mm256_maskstore_ps(s + i, _mm256_and_si256(is_hidden, lane_mask(n - i)), hidden);
  }
}

float max(const float* s, std::size_t n) {
  __m256 top = _mm256_set1_ps(-__builtin_inff());
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    // vmaxps returns the second operand if one is NaN, so a NaN never displaces the maximum.
    top = _mm256_max_ps(_mm256_loadu_ps(s + i), top);
  }
  if (i < n) {
    const __m256i lanes = lane_mask(n - i);
    const __m256 tail =
        _mm256_blendv_ps(top, _mm256_maskload_ps(s + i, lanes), _mm256_castsi256_ps(lanes));
    top = _mm256_max_ps(tail, top);
  }
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

float exp2_sum(float* s, std::size_t n, float m) {
  if (m == -__builtin_inff()) {
    for (std::size_t i = 0; i < n; ++i) {
      s[i] = 0.0f;
    }
    return 0.0f;
  }
  const __m256 reference = _mm256_set1_ps(m);
  __m256 sum0 = _mm256_setzero_ps();
  __m256 sum1 = _mm256_setzero_ps();
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256 p0 = exp2_of(_mm256_sub_ps(_mm256_loadu_ps(s + i), reference));
    const __m256 p1 = exp2_of(_mm256_sub_ps(_mm256_loadu_ps(s + i + 8), reference));
    _mm256_storeu_ps(s + i, p0);
    _mm256_storeu_ps(s + i + 8, p1);
    sum0 = _mm256_add_ps(sum0, p0);
    sum1 = _mm256_add_ps(sum1, p1);
  }
  for (; i < n; i += 8) {
    const __m256i lanes = lane_mask(n - i);
    const __m256 p = exp2_of(_mm256_sub_ps(_mm256_maskload_ps(s + i, lanes), reference));
    _mm256_maskstore_ps(s + i, lanes, p);
    sum0 = _mm256_add_ps(sum0, _mm256_and_ps(p, _mm256_castsi256_ps(lanes)));
  }
  return sum_of(_mm256_add_ps(sum0, sum1));
}

void axpby(float* y, std::size_t n, float a, const float* x, float b) {
  const __m256 factor_y = _mm256_set1_ps(a);
  const __m256 factor_x = _mm256_set1_ps(b);
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 scaled = _mm256_mul_ps(factor_x, _mm256_loadu_ps(x + i));
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(factor_y, _mm256_loadu_ps(y + i), scaled));
  }
  if (i < n) {
    const __m256i lanes = lane_mask(n - i);
    const __m256 scaled = _mm256_mul_ps(factor_x, _mm256_maskload_ps(x + i, lanes));
    _mm256_maskstore_ps(y + i, lanes,
                        _mm256_fmadd_ps(factor_y, _mm256_maskload_ps(y + i, lanes), scaled));
  }
}

void multiply(float* y, const float* x, const float* w, std::size_t n) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(w + i)));
  }
  if (i < n) {
    const __m256i lanes = lane_mask(n - i);
    _mm256_maskstore_ps(
        y + i, lanes,
        _mm256_mul_ps(_mm256_maskload_ps(x + i, lanes), _mm256_maskload_ps(w + i, lanes)));
  }
}

float dot(const float* x, const float* w, std::size_t n) {
  __m256 sum0 = _mm256_setzero_ps();
  __m256 sum1 = _mm256_setzero_ps();
  std::size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    sum0 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(w + i), sum0);
    sum1 = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8), _mm256_loadu_ps(w + i + 8), sum1);
  }
  for (; i < n; i += 8) {
    const __m256i lanes = lane_mask(n - i);
    sum0 =
        _mm256_fmadd_ps(_mm256_maskload_ps(x + i, lanes), _mm256_maskload_ps(w + i, lanes), sum0);
  }
  return sum_of(_mm256_add_ps(sum0, sum1));
}

}  // namespace zipcache::kernels::avx2
