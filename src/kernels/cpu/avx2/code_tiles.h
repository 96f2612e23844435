// The inner loops of the product with codes: unpacking and the register-blocked tile.
#pragma once

#include "kernels/cpu/avx2/isa.h"

namespace zipcache::kernels::avx2 {
namespace {

// In place of a code width: codes that were split into pairs of 16 bits beforehand. Per quad (4
// inner positions) and half of the lane group: 32 bytes of positions 0 and 2, 32 of 1 and 3.
constexpr int kWide = 0;

// A step of the inner loop: one word of a lane group (3 bits: one word of the high plane and two of
// the low plane), or four quads of wide codes.
constexpr std::size_t step_positions(int bits) {
  return bits == kWide ? 16 : bits == 3 ? 32 : 32 / static_cast<std::size_t>(bits);
}
template <int kBits>
constexpr std::size_t kStepPositions = step_positions(kBits);
template <int kBits>
constexpr int kStepQuads = static_cast<int>(kStepPositions<kBits> / 4);
template <int kBits>
constexpr std::size_t kStepBytes = kBits == kWide ? 512
                                   : kBits == 3   ? 128
                                                  : 64;  // of the low plane

[[gnu::always_inline]] inline __m256i load(const char* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

[[gnu::always_inline]] inline __m256i broadcast_pair(const char* p) {
  std::int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
}

// How far ahead of the codes in use memory is asked for them; see avx512/code_tiles.h.
constexpr std::size_t kPrefetchBytes = 4096;

template <int kBits>
[[gnu::always_inline]] inline void prefetch_step(const char* low, const char* high) {
  if constexpr (kBits != kWide) {
#pragma GCC unroll 2
    for (std::size_t line = 0; line < kStepBytes<kBits>; line += 64) {
      _mm_prefetch(low + kPrefetchBytes + line, _MM_HINT_T0);
    }
  }
  if constexpr (kBits == 3) {
    _mm_prefetch(high + kPrefetchBytes, _MM_HINT_T0);
  }
}

// Adds the products of 16 pairs to 8 sums.
[[gnu::always_inline]] inline void accumulate(__m256i* sum, __m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
  *sum = _mm256_dpwssd_avx_epi32(*sum, codes, x);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
  *sum = _mm256_dpwssd_epi32(*sum, codes, x);
#else
  // NOTE: the empty asm keeps GCC from reassociating the sums, which it does into a tree of all
  // products of a step, most of them spilled to the stack (52 instead of 60 GMAC/s).
  *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(codes, x));
  __asm__("" : "+x"(*sum));
#endif
}

// Codes of inner positions 4 * quad .. 4 * quad + 3 of a step, as 4 bytes per lane.
template <int kBits>
[[gnu::always_inline]] inline __m256i codes_of_quad(const char* low, const char* high, int quad) {
  if constexpr (kBits == 8) {
    return load(low);
  } else if constexpr (kBits == 3) {
    // A word of the high plane spans two of the low plane. The last step may have only one: what
    // stands there instead is the high plane, in bounds, and x is zero at these positions.
    const __m256i low_bits = _mm256_srli_epi32(load(low + quad / 4 * 64), quad % 4 * 2);
    const __m256i plane = load(high);
    const __m256i high_bit =
        quad < 2 ? _mm256_slli_epi32(plane, 2 - quad) : _mm256_srli_epi32(plane, quad - 2);
    return _mm256_or_si256(_mm256_and_si256(low_bits, _mm256_set1_epi8(3)),
                           _mm256_and_si256(high_bit, _mm256_set1_epi8(4)));
  } else {
    const __m256i shifted = _mm256_srli_epi32(load(low), quad * kBits);
    return _mm256_and_si256(shifted, _mm256_set1_epi8((1 << kBits) - 1));
  }
}

// The same as pairs of 16-bit integers, for 8 of the 16 lanes.
struct Pairs {
  __m256i even;  // positions 0 and 2 of the quad
  __m256i odd;   // positions 1 and 3
};
template <int kBits>
[[gnu::always_inline]] inline Pairs pairs_of_quad(const char* low, const char* high, int quad,
                                                  int half) {
  if constexpr (kBits == kWide) {
    return {load(low + quad * 128 + half * 64), load(low + quad * 128 + half * 64 + 32)};
  } else {
    const __m256i codes = codes_of_quad<kBits>(low + half * 32, high + half * 32, quad);
    return {_mm256_and_si256(codes, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(codes, 8)};
  }
}

// Writes the pairs of one lane group.
template <int kBits>
void widen(const char* low, const char* high, std::size_t n_steps, char* wide) {
  for (std::size_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 8
    for (int quad = 0; quad < kStepQuads<kBits>; ++quad) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Pairs pairs = pairs_of_quad<kBits>(low, high, quad, half);
        auto* const out = reinterpret_cast<__m256i*>(wide + quad * 128 + half * 64);
        _mm256_store_si256(out, pairs.even);
        _mm256_store_si256(out + 1, pairs.odd);
      }
    }
    prefetch_step<kBits>(low, high);
    low += kStepBytes<kBits>;
    high += 64;
    wide += kStepQuads<kBits> * 128;
  }
}

// y[row][16 lanes] (+)= x[row] * codes. All row counts do the same arithmetic.
template <int kBits, int kRows>
void tile(const char* low, const char* high, std::size_t n_steps, const char* x,
          std::size_t row_bytes, const float* steps, float* y, std::size_t y_stride, bool add) {
  __m256i sum[kRows][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = _mm256_setzero_si256();
    sum[row][1] = _mm256_setzero_si256();
  }
  do {
#pragma GCC unroll 8
    for (int quad = 0; quad < kStepQuads<kBits>; ++quad) {
      const Pairs codes[2] = {pairs_of_quad<kBits>(low, high, quad, 0),
                              pairs_of_quad<kBits>(low, high, quad, 1)};
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m256i x_even = broadcast_pair(x + row * row_bytes + quad * 8);
        const __m256i x_odd = broadcast_pair(x + row * row_bytes + quad * 8 + 4);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          accumulate(&sum[row][half], codes[half].even, x_even);
          accumulate(&sum[row][half], codes[half].odd, x_odd);
        }
      }
    }
    prefetch_step<kBits>(low, high);
    low += kStepBytes<kBits>;
    high += 64;
    x += kStepQuads<kBits> * 8;
  } while (--n_steps > 0);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* const out = y + row * y_stride + half * 8;
      const __m256 product =
          _mm256_mul_ps(_mm256_cvtepi32_ps(sum[row][half]), _mm256_set1_ps(steps[row]));
      _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), product) : product);
    }
  }
}

}  // namespace
}  // namespace zipcache::kernels::avx2
