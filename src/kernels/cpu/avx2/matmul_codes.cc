// Product of quantized rows with a matrix of packed codes, by vpmaddwd: pairs of 16-bit codes times
// pairs of 16-bit x into s32 accumulators, exact, then y = sum * step.
#include "format/code_layout.h"
#include "kernels/cpu/avx2/quantize_rows.h"

namespace zipcache::kernels::avx2 {
namespace {

constexpr int kMaxTileRows = 4;

// One word of a lane group (3 bits: one word of the high plane, two of the low plane) is a step.
template <int kBits>
constexpr std::size_t kStepPositions = kBits == 3 ? 32 : 32 / kBits;

// Inner positions between two flushes of the accumulators: positions * (2^bits - 1) * 32639 < 2^31.
template <int kBits>
constexpr std::size_t kFlushPositions = kBits == 8 ? 256 : 4096;

[[gnu::always_inline]] inline __m256i load(const char* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

[[gnu::always_inline]] inline __m256i broadcast_pair(const char* p) {
  std::int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return _mm256_set1_epi32(pair);
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

// y[row][16 lanes] (+)= x[row] * codes. All row counts do the same arithmetic.
template <int kBits, int kRows>
void tile(const char* low, const char* high, std::size_t n_steps, const char* x,
          std::size_t row_bytes, const float* steps, float* y, std::size_t y_stride, bool add) {
  constexpr int kQuads = static_cast<int>(kStepPositions<kBits> / 4);
  __m256i sum[kRows][2];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = _mm256_setzero_si256();
    sum[row][1] = _mm256_setzero_si256();
  }
  for (std::size_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 8
    for (int quad = 0; quad < kQuads; ++quad) {
      __m256i even[2];
      __m256i odd[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i codes = codes_of_quad<kBits>(low + half * 32, high + half * 32, quad);
        even[half] = _mm256_and_si256(codes, _mm256_set1_epi16(0xff));
        odd[half] = _mm256_srli_epi16(codes, 8);
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m256i x_even = broadcast_pair(x + row * row_bytes + quad * 8);
        const __m256i x_odd = broadcast_pair(x + row * row_bytes + quad * 8 + 4);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          sum[row][half] = _mm256_add_epi32(sum[row][half], _mm256_madd_epi16(even[half], x_even));
          sum[row][half] = _mm256_add_epi32(sum[row][half], _mm256_madd_epi16(odd[half], x_odd));
        }
      }
    }
    low += kBits == 3 ? 128 : 64;
    high += 64;
    x += kQuads * 8;
  }
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

template <int kBits>
void run(const MatrixView& m, const QuantizedRows& x, std::size_t n_rows, float* y,
         std::size_t y_stride) {
  static constexpr decltype(&tile<kBits, 1>) kTiles[kMaxTileRows + 1] = {
      nullptr, tile<kBits, 1>, tile<kBits, 2>, tile<kBits, 3>, tile<kBits, 4>};
  const std::size_t n_groups = format::group_count(m.lanes);
  const std::size_t group_bytes = format::group_words(kBits, m.inner) * format::kGroupWordBytes;
  const std::size_t high_plane =
      kBits == 3 ? format::plane_words(2, m.inner) * format::kGroupWordBytes : 0;
  constexpr std::size_t kStepBytes = kBits == 3 ? 128 : 64;  // of the low plane
  constexpr std::size_t kFlushSteps = kFlushPositions<kBits> / kStepPositions<kBits>;
  const std::size_t n_steps = (m.inner + kStepPositions<kBits> - 1) / kStepPositions<kBits>;
  const std::size_t n_blocks = (n_rows + kMaxTileRows - 1) / kMaxTileRows;

  for (std::size_t group = 0; group < n_groups; ++group) {
    const char* const words = static_cast<const char*>(m.data) + group * group_bytes;
    std::size_t row = 0;
    for (std::size_t block = 0; block < n_blocks; ++block) {
      const std::size_t rows = n_rows / n_blocks + (block < n_rows % n_blocks ? 1 : 0);
      for (std::size_t step = 0; step < n_steps; step += kFlushSteps) {
        const std::size_t steps = n_steps - step < kFlushSteps ? n_steps - step : kFlushSteps;
        kTiles[rows](words + step * kStepBytes, words + high_plane + step * 64, steps,
                     x.bytes + row * x.row_bytes + step * kStepPositions<kBits> * 2, x.row_bytes,
                     x.steps + row, y + row * y_stride + group * 16, y_stride, step > 0);
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
      for (std::size_t lane = 0; lane < m.lanes; lane += 8) {
        _mm256_storeu_ps(y + row * y_stride + lane, _mm256_setzero_ps());
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

}  // namespace zipcache::kernels::avx2
