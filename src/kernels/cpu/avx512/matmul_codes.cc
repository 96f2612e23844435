// Product of quantized rows with a matrix of packed codes, by vpdpbusd: u8 codes times the low and
// the high bytes of x into two s32 accumulators, exact, then y = (256 * high + low) * step.
#include "format/code_layout.h"
#include "kernels/cpu/avx512/quantize_rows.h"

namespace zipcache::kernels::avx512 {
namespace {

// Inner positions between two flushes of the accumulators: 2^15 * 255 * 128 < 2^30.
constexpr std::size_t kFlushPositions = 1u << 15;
// Row counts with a tile of their own, and lane groups that share one pass over the rows.
constexpr int kMaxTileRows = 8;
constexpr std::size_t kSpanGroups = 4;

// One word of a lane group (3 bits: one word of the high plane, two of the low plane) is a step.
template <int kBits>
constexpr std::size_t kStepPositions = kBits == 3 ? 32 : 32 / kBits;

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

// Codes of inner positions 4 * quad .. 4 * quad + 3 of a step, as 4 bytes per lane.
template <int kBits>
[[gnu::always_inline]] inline __m512i codes_of_quad(const char* low, const char* high, int quad) {
  if constexpr (kBits == 8) {
    return _mm512_loadu_si512(low);
  } else if constexpr (kBits == 3) {
    // A word of the high plane spans two of the low plane. The last step may have only one: what
    // stands there instead is the high plane, in bounds, and x is zero at these positions.
    const __m512i low_bits =
        _mm512_srli_epi32(_mm512_loadu_si512(low + quad / 4 * 64), quad % 4 * 2);
    const __m512i plane = _mm512_loadu_si512(high);
    const __m512i high_bit =
        quad < 2 ? _mm512_slli_epi32(plane, 2 - quad) : _mm512_srli_epi32(plane, quad - 2);
    // Bits 0 and 1 from low_bits, the others from high_bit: 0xca = c ? a : b with c first.
    const __m512i joined = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low_bits, high_bit, 0xca);
    return _mm512_and_si512(joined, _mm512_set1_epi8(7));
  } else {
    const __m512i shifted = _mm512_srli_epi32(_mm512_loadu_si512(low), quad * kBits);
    return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << kBits) - 1));
  }
}

// y[row][16 lanes of each group] (+)= x[row] * codes. All row counts do the same arithmetic.
template <int kBits, int kRows, int kGroups>
void tile(Words words, std::size_t n_steps, const char* x, std::size_t row_bytes,
          const float* steps, float* y, std::size_t y_stride, bool add) {
  constexpr int kQuads = static_cast<int>(kStepPositions<kBits> / 4);
  constexpr std::size_t kLowBytes = kBits == 3 ? 128 : 64;
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
    for (int quad = 0; quad < kQuads; ++quad) {
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
    words.low += kLowBytes;
    words.high += 64;
    x += kQuads * 8;
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

using Tile = void (*)(Words, std::size_t, const char*, std::size_t, const float*, float*,
                      std::size_t, bool);

// 2 accumulators per row and group; 10 hide the latency of vpdpbusd (5 cycles, 2 per cycle), and
// more rows share the unpacking of the codes.
constexpr std::size_t tile_groups(std::size_t rows) { return rows == 1 ? 4 : rows <= 5 ? 2 : 1; }

template <int kBits>
[[gnu::always_inline]] inline Tile find_tile(std::size_t rows, std::size_t groups) {
  static constexpr Tile kSingle[kMaxTileRows + 1] = {
      nullptr,           tile<kBits, 1, 1>, tile<kBits, 2, 1>, tile<kBits, 3, 1>, tile<kBits, 4, 1>,
      tile<kBits, 5, 1>, tile<kBits, 6, 1>, tile<kBits, 7, 1>, tile<kBits, 8, 1>};
  static constexpr Tile kPair[6] = {nullptr,           tile<kBits, 1, 2>, tile<kBits, 2, 2>,
                                    tile<kBits, 3, 2>, tile<kBits, 4, 2>, tile<kBits, 5, 2>};
  return groups == 4 ? tile<kBits, 1, 4> : groups == 2 ? kPair[rows] : kSingle[rows];
}

template <int kBits>
void run(const MatrixView& m, const QuantizedRows& x, std::size_t n_rows, float* y,
         std::size_t y_stride) {
  const std::size_t n_groups = format::group_count(m.lanes);
  const std::size_t group_bytes = format::group_words(kBits, m.inner) * format::kGroupWordBytes;
  const std::size_t high_plane =
      kBits == 3 ? format::plane_words(2, m.inner) * format::kGroupWordBytes : 0;
  constexpr std::size_t kStepBytes = kBits == 3 ? 128 : 64;  // of the low plane
  constexpr std::size_t kFlushSteps = kFlushPositions / kStepPositions<kBits>;
  const std::size_t n_steps = (m.inner + kStepPositions<kBits> - 1) / kStepPositions<kBits>;
  const std::size_t n_blocks = (n_rows + kMaxTileRows - 1) / kMaxTileRows;

  for (std::size_t span = 0; span < n_groups; span += kSpanGroups) {
    const std::size_t span_end = span + kSpanGroups < n_groups ? span + kSpanGroups : n_groups;
    std::size_t row = 0;
    for (std::size_t block = 0; block < n_blocks; ++block) {
      const std::size_t rows = n_rows / n_blocks + (block < n_rows % n_blocks ? 1 : 0);
      std::size_t tile_width = tile_groups(rows);
      for (std::size_t group = span; group < span_end; group += tile_width) {
        while (group + tile_width > span_end) {
          tile_width /= 2;
        }
        const Tile run_tile = find_tile<kBits>(rows, tile_width);
        const char* const words = static_cast<const char*>(m.data) + group * group_bytes;
        for (std::size_t step = 0; step < n_steps; step += kFlushSteps) {
          const std::size_t steps = n_steps - step < kFlushSteps ? n_steps - step : kFlushSteps;
          run_tile({words + step * kStepBytes, words + high_plane + step * 64, group_bytes}, steps,
                   x.bytes + row * x.row_bytes + step * kStepPositions<kBits> * 2, x.row_bytes,
                   x.steps + row, y + row * y_stride + group * 16, y_stride, step > 0);
        }
      }
      row += rows;
    }
  }
}

}  // namespace

void matmul_codes(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                  float* y, std::size_t y_stride, Scratch scratch) {
  if (m.inner == 0) {
    for (std::size_t row = 0; row < n_rows; ++row) {
      for (std::size_t lane = 0; lane < m.lanes; lane += 16) {
        _mm512_storeu_ps(y + row * y_stride + lane, _mm512_setzero_ps());
      }
    }
    return;
  }
  const QuantizedRows rows = quantize_rows(x, x_stride, n_rows, m.inner, scratch);
  switch (m.bits) {
    case 2:
      return run<2>(m, rows, n_rows, y, y_stride);
    case 3:
      return run<3>(m, rows, n_rows, y, y_stride);
    case 4:
      return run<4>(m, rows, n_rows, y, y_stride);
    default:
      return run<8>(m, rows, n_rows, y, y_stride);
  }
}

}  // namespace zipcache::kernels::avx512
