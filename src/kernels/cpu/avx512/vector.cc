// Element-wise kernels and reductions over rows of scores.
#include "kernels/cpu/avx512/isa.h"

namespace zipcache::kernels::avx512 {
namespace {

// 2^t, relative error about 1e-7 (polynomial 9.2e-9, the rest rounding). NaN stays NaN; below -200
// (-infinity included) the result is 0 after vscalefps, above 128 infinity.
[[gnu::always_inline]] inline __m512 exp2_of(__m512 t) {
  // Operand order keeps NaN: vmaxps and vminps return the second operand if one is NaN.
  t = _mm512_max_ps(_mm512_set1_ps(-200.0f), t);
  t = _mm512_min_ps(_mm512_set1_ps(200.0f), t);
  const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(t, whole);  // exact, in [-0.5, 0.5]
  // (2^f - 1) / f, degree 5, interpolated at the Chebyshev nodes of [-0.5, 0.5].
  __m512 p = _mm512_set1_ps(0x1.44138ap-13f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.5f089p-10f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3b2a54p-7f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c6af6cp-5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfbep-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e43p-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

}  // namespace

void mask(float* s, std::size_t n, const std::uint64_t* visible) {
  const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
  for (std::size_t i = 0; i < n; i += 16) {
    const auto bits = static_cast<__mmask16>(visible[i / 64] >> i % 64);
    _mm512_mask_storeu_ps(s + i, static_cast<__mmask16>(~bits & lane_mask(n - i)), hidden);
  }
}

float max(const float* s, std::size_t n) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 top0 = lowest;
  __m512 top1 = lowest;
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    // vmaxps returns the second operand if one is NaN, so a NaN never displaces the maximum.
    top0 = _mm512_max_ps(_mm512_loadu_ps(s + i), top0);
    top1 = _mm512_max_ps(_mm512_loadu_ps(s + i + 16), top1);
  }
  for (; i < n; i += 16) {
    top0 = _mm512_max_ps(_mm512_mask_loadu_ps(lowest, lane_mask(n - i), s + i), top0);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(top0, top1));
}

float exp2_sum(float* s, std::size_t n, float m) {
  if (m == -__builtin_inff()) {
    for (std::size_t i = 0; i < n; i += 16) {
      _mm512_mask_storeu_ps(s + i, lane_mask(n - i), _mm512_setzero_ps());
    }
    return 0.0f;
  }
  const __m512 reference = _mm512_set1_ps(m);
  __m512 sum0 = _mm512_setzero_ps();
  __m512 sum1 = _mm512_setzero_ps();
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512 p0 = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(s + i), reference));
    const __m512 p1 = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(s + i + 16), reference));
    _mm512_storeu_ps(s + i, p0);
    _mm512_storeu_ps(s + i + 16, p1);
    sum0 = _mm512_add_ps(sum0, p0);
    sum1 = _mm512_add_ps(sum1, p1);
  }
  for (; i < n; i += 16) {
    const __mmask16 lanes = lane_mask(n - i);
    const __m512 p = exp2_of(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, s + i), reference));
    _mm512_mask_storeu_ps(s + i, lanes, p);
    sum0 = _mm512_mask_add_ps(sum0, lanes, sum0, p);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

void axpby(float* y, std::size_t n, float a, const float* x, float b) {
  const __m512 factor_y = _mm512_set1_ps(a);
  const __m512 factor_x = _mm512_set1_ps(b);
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = lane_mask(n - i);
    const __m512 scaled = _mm512_mul_ps(factor_x, _mm512_maskz_loadu_ps(lanes, x + i));
    const __m512 sum = _mm512_fmadd_ps(factor_y, _mm512_maskz_loadu_ps(lanes, y + i), scaled);
    _mm512_mask_storeu_ps(y + i, lanes, sum);
  }
}

void multiply(float* y, const float* x, const float* w, std::size_t n) {
  for (std::size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = lane_mask(n - i);
    const __m512 product =
        _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_maskz_loadu_ps(lanes, w + i));
    _mm512_mask_storeu_ps(y + i, lanes, product);
  }
}

float dot(const float* x, const float* w, std::size_t n) {
  __m512 sum0 = _mm512_setzero_ps();
  __m512 sum1 = _mm512_setzero_ps();
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    sum0 = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(w + i), sum0);
    sum1 = _mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(w + i + 16), sum1);
  }
  for (; i < n; i += 16) {
    const __mmask16 lanes = lane_mask(n - i);
    sum0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, x + i), _mm512_maskz_loadu_ps(lanes, w + i),
                           sum0);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

}  // namespace zipcache::kernels::avx512
