// Product of quantized rows with a matrix of packed codes: pairs of 16-bit codes times pairs of
// 16-bit x into s32 accumulators, exact, then y = sum * step. Compiled once for AVX2 and once for
// AVX-VNNI, whose vpdpwssd multiplies and adds in one instruction (code_tiles.h).
#pragma once

#include "format/code_layout.h"
#include "kernels/cpu/avx2/code_tiles.h"
#include "kernels/cpu/avx2/quantize_rows.h"

namespace zipcache::kernels::avx2 {
namespace {

// Inner positions between two flushes of the accumulators: positions * (2^bits - 1) * 32639 < 2^31.
template <int kBits>
constexpr std::size_t kFlushPositions = kBits == 8 ? 256 : 4096;
// Row counts with a tile of their own: 8 accumulators, 4 vectors of codes, x, a product, masks.
constexpr std::size_t kMaxTileRows = 4;
// From this many rows on, codes are unpacked once for all rows. Scratch has room for it: per inner
// position 4 bytes a row, of which the rows themselves use 2; the wide codes of a group take 32.
constexpr std::size_t kWideRows = 16;

// What one call works on.
struct Job {
  const MatrixView& m;
  QuantizedRows x;
  std::size_t n_rows = 0;
  float* y = nullptr;
  std::size_t y_stride = 0;
};

// All rows times one lane group, whose codes stand at `low` (and `high`, 3 bits).
template <int kBits>
void run_group(const Job& job, const char* low, const char* high, std::size_t flush_positions,
               float* y) {
  static constexpr decltype(&tile<kBits, 1>) kTiles[kMaxTileRows + 1] = {
      nullptr, tile<kBits, 1>, tile<kBits, 2>, tile<kBits, 3>, tile<kBits, 4>};
  const std::size_t flush_steps = flush_positions / kStepPositions<kBits>;
  const std::size_t n_steps = (job.m.inner + kStepPositions<kBits> - 1) / kStepPositions<kBits>;
  const std::size_t n_blocks = (job.n_rows + kMaxTileRows - 1) / kMaxTileRows;
  std::size_t row = 0;
  for (std::size_t block = 0; block < n_blocks; ++block) {
    const std::size_t rows = job.n_rows / n_blocks + (block < job.n_rows % n_blocks ? 1 : 0);
    for (std::size_t step = 0; step < n_steps; step += flush_steps) {
      const std::size_t steps = n_steps - step < flush_steps ? n_steps - step : flush_steps;
      kTiles[rows](low + step * kStepBytes<kBits>, high + step * 64, steps,
                   job.x.bytes + row * job.x.row_bytes + step * kStepPositions<kBits> * 2,
                   job.x.row_bytes, job.x.steps + row, y + row * job.y_stride, job.y_stride,
                   step > 0);
    }
    row += rows;
  }
}

template <int kBits>
void run(const Job& job) {
  const std::size_t group_bytes = format::group_words(kBits, job.m.inner) * format::kGroupWordBytes;
  const std::size_t high_plane =
      kBits == 3 ? format::plane_words(2, job.m.inner) * format::kGroupWordBytes : 0;
  const std::size_t n_steps = (job.m.inner + kStepPositions<kBits> - 1) / kStepPositions<kBits>;
  for (std::size_t lane = 0; lane < job.m.lanes; lane += 16) {
    const char* const low = static_cast<const char*>(job.m.data) + lane / 16 * group_bytes;
    if (job.n_rows < kWideRows) {
      run_group<kBits>(job, low, low + high_plane, kFlushPositions<kBits>, job.y + lane);
    } else {
      // What stands beyond the last code does not matter: x is zero there.
      widen<kBits>(low, low + high_plane, n_steps, job.x.end);
      run_group<kWide>(job, job.x.end, job.x.end, kFlushPositions<kBits>, job.y + lane);
    }
  }
}

void multiply_codes(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                    float* y, std::size_t y_stride, Scratch scratch) {
  if (m.inner == 0) {
    for (std::size_t row = 0; row < n_rows; ++row) {
      for (std::size_t lane = 0; lane < m.lanes; lane += 8) {
        _mm256_storeu_ps(y + row * y_stride + lane, _mm256_setzero_ps());
      }
    }
    return;
  }
  const Job job = {m, quantize_rows(x, x_stride, n_rows, m.inner, scratch), n_rows, y, y_stride};
  switch (m.bits) {
    case 2:
      return run<2>(job);
    case 3:
      return run<3>(job);
    case 4:
      return run<4>(job);
    default:
      return run<8>(job);
  }
}

}  // namespace
}  // namespace zipcache::kernels::avx2
