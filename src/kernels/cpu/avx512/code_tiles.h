// The inner loops of the product with codes: unpacking and the register-blocked tile.
#pragma once

#include "kernels/cpu/avx512/isa.h"

namespace zipcache::kernels::avx512 {
namespace {

// In place of a code width: codes that were widened to bytes beforehand, 64 bytes per quad.
constexpr int kWide = 0;

// A step of the inner loop: one word of a lane group (3 bits: one word of the high plane and two of
// the low plane), or four quads of widened codes.
constexpr std::size_t step_positions(int bits) {
  return bits == kWide ? 16 : bits == 3 ? 32 : 32 / static_cast<std::size_t>(bits);
}
template <int kBits>
constexpr std::size_t kStepPositions = step_positions(kBits);
template <int kBits>
constexpr int kStepQuads = static_cast<int>(kStepPositions<kBits> / 4);
template <int kBits>
constexpr std::size_t kStepBytes = kBits == kWide ? 256
                                   : kBits == 3   ? 128
                                                  : 64;  // of Words::low

// The words of `kGroups` neighbouring lane groups.
struct Words {
  const char* low = nullptr;   // plane with the low bits (the only one unless 3 bits)
  const char* high = nullptr;  // 3 bits: plane with the high bit
  std::size_t group_bytes = 0;
};

[[gnu::always_inline]] inline __m512i broadcast4(const char* p) {
  std::int32_t four_bytes;
  __builtin_memcpy(&four_bytes, p, 4);
  return _mm512_set1_epi32(four_bytes);
}

// How far ahead of the codes in use memory is asked for: a lane group is too short a stream (0.5 to
// 4 KiB) for the hardware, and two groups are read side by side, so that 4 KiB ahead may be in use
// already. Codes in memory, 4 rows x 128 lanes x 512: 3 bits 3.9 us at 4 KiB, 3.2 us at 8 KiB, 4
// bits 3.5 and 3.0 us; 512 lanes x 128 and codes in cache: no difference.
constexpr std::size_t kPrefetchBytes = 8192;

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

// Codes of inner positions 4 * quad .. 4 * quad + 3 of a step, as 4 bytes per lane.
template <int kBits>
[[gnu::always_inline]] inline __m512i codes_of_quad(const char* low, const char* high, int quad) {
  if constexpr (kBits == kWide) {
    return _mm512_loadu_si512(low + quad * 64);
  } else if constexpr (kBits == 8) {
    return _mm512_loadu_si512(low);
  } else if constexpr (kBits == 3) {
    // A word of the high plane spans two of the low plane. The last step may have only one: what
    // stands there instead is the high plane, in bounds, and x is zero at these positions.
    const __m512i low_bits =
        _mm512_srli_epi32(_mm512_loadu_si512(low + quad / 4 * 64), quad % 4 * 2);
    const __m512i plane = _mm512_loadu_si512(high);
    const __m512i high_bit =
        quad < 2 ? _mm512_slli_epi32(plane, 2 - quad) : _mm512_srli_epi32(plane, quad - 2);
    // Bits 0 and 1 from low_bits, the others from high_bit: 0xe4 = third operand ? first : second.
    const __m512i joined = _mm512_ternarylogic_epi32(low_bits, high_bit, _mm512_set1_epi8(3), 0xe4);
    return _mm512_and_si512(joined, _mm512_set1_epi8(7));
  } else {
    const __m512i shifted = _mm512_srli_epi32(_mm512_loadu_si512(low), quad * kBits);
    return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << kBits) - 1));
  }
}

// Widens the codes of one lane group.
template <int kBits>
void widen(const char* low, const char* high, std::size_t n_steps, char* wide) {
  for (std::size_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 8
    for (int quad = 0; quad < kStepQuads<kBits>; ++quad) {
      _mm512_store_si512(wide + quad * 64, codes_of_quad<kBits>(low, high, quad));
    }
    prefetch_step<kBits>(low, high);
    low += kStepBytes<kBits>;
    high += 64;
    wide += kStepQuads<kBits> * 64;
  }
}

// y[row][16 lanes of each group] (+)= x[row] * codes. All row counts do the same arithmetic.
template <int kBits, int kRows, int kGroups>
void tile(Words words, std::size_t n_steps, const char* x, std::size_t row_bytes,
          const float* steps, float* y, std::size_t y_stride, bool add) {
  __m512i low[kRows][kGroups];
  __m512i high[kRows][kGroups];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      low[row][group] = _mm512_setzero_si512();
      high[row][group] = _mm512_setzero_si512();
    }
  }
  do {
#pragma GCC unroll 8
    for (int quad = 0; quad < kStepQuads<kBits>; ++quad) {
      __m512i codes[kGroups];
#pragma GCC unroll 4
      for (int group = 0; group < kGroups; ++group) {
        codes[group] = codes_of_quad<kBits>(words.low + group * words.group_bytes,
                                            words.high + group * words.group_bytes, quad);
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m512i x_low = broadcast4(x + row * row_bytes + quad * 8);
        const __m512i x_high = broadcast4(x + row * row_bytes + quad * 8 + 4);
#pragma GCC unroll 4
        for (int group = 0; group < kGroups; ++group) {
          low[row][group] = _mm512_dpbusd_epi32(low[row][group], codes[group], x_low);
          high[row][group] = _mm512_dpbusd_epi32(high[row][group], codes[group], x_high);
        }
      }
    }
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      prefetch_step<kBits>(words.low + group * words.group_bytes,
                           words.high + group * words.group_bytes);
    }
    words.low += kStepBytes<kBits>;
    words.high += 64;
    x += kStepQuads<kBits> * 8;
  } while (--n_steps > 0);
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int group = 0; group < kGroups; ++group) {
      // Converted before combining: 256 * high would not fit s32.
      const __m512 sum =
          _mm512_fmadd_ps(_mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(high[row][group]),
                          _mm512_cvtepi32_ps(low[row][group]));
      float* const out = y + row * y_stride + group * 16;
      const __m512 product = _mm512_mul_ps(sum, _mm512_set1_ps(steps[row]));
      _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), product) : product);
    }
  }
}

}  // namespace
}  // namespace zipcache::kernels::avx512
