// Product of quantized rows with a matrix of packed codes, by vpdpbusd: u8 codes times the low and
// the high bytes of x into two s32 accumulators, exact, then y = (256 * high + low) * step.
#include "format/code_layout.h"
#include "kernels/cpu/avx512/code_tiles.h"
#include "kernels/cpu/avx512/quantize_rows.h"

namespace zipcache::kernels::avx512 {
namespace {

// Inner positions between two flushes of the accumulators: 2^15 * 255 * 128 < 2^30.
constexpr std::size_t kFlushPositions = 1u << 15;
// Row counts with a tile of their own, and lane groups that share one pass over the rows.
constexpr std::size_t kMaxTileRows = 8;
constexpr std::size_t kSpanGroups = 4;
// From this many rows on, codes are unpacked once for all rows. Scratch has room for it: per inner
// position 4 bytes a row, of which the rows themselves use 2.
constexpr std::size_t kWideRows = 16;
constexpr std::size_t kWideGroups = 2;
// 5 rows x 2 groups: 148 GMAC/s where 8 x 1 gives 144 (2 broadcasts per load port and cycle).
constexpr std::size_t kMaxWideTileRows = 5;

// Widened codes of a lane group, in whole rows of 32 positions like x. What stands beyond the last
// code does not matter: x is zero there.
constexpr std::size_t wide_group_bytes(std::size_t inner) { return (inner + 31) / 32 * 32 * 16; }

using Tile = void (*)(Words, std::size_t, const char*, std::size_t, const float*, float*,
                      std::size_t, bool);

// 2 accumulators per row and group; 10 hide the latency of vpdpbusd (5 cycles, 2 per cycle), and
// more rows share the unpacking of the codes.
constexpr std::size_t tile_groups(std::size_t rows) { return rows == 1 ? 4 : rows <= 5 ? 2 : 1; }

template <int kBits>
Tile find_tile(std::size_t rows, std::size_t groups) {
  static constexpr Tile kSingle[kMaxTileRows + 1] = {
      nullptr,           tile<kBits, 1, 1>, tile<kBits, 2, 1>, tile<kBits, 3, 1>, tile<kBits, 4, 1>,
      tile<kBits, 5, 1>, tile<kBits, 6, 1>, tile<kBits, 7, 1>, tile<kBits, 8, 1>};
  static constexpr Tile kPair[6] = {nullptr,           tile<kBits, 1, 2>, tile<kBits, 2, 2>,
                                    tile<kBits, 3, 2>, tile<kBits, 4, 2>, tile<kBits, 5, 2>};
  return groups == 4 ? tile<kBits, 1, 4> : groups == 2 ? kPair[rows] : kSingle[rows];
}

// What one call works on.
struct Job {
  const MatrixView& m;
  QuantizedRows x;
  std::size_t n_rows = 0;
  float* y = nullptr;
  std::size_t y_stride = 0;
};

// All rows times the lane groups [group, group_end), whose codes stand at `words`.
template <int kBits>
void run_groups(const Job& job, Words words, std::size_t group, std::size_t group_end,
                std::size_t max_rows) {
  constexpr std::size_t kFlushSteps = kFlushPositions / kStepPositions<kBits>;
  const std::size_t n_steps = (job.m.inner + kStepPositions<kBits> - 1) / kStepPositions<kBits>;
  const std::size_t n_blocks = (job.n_rows + max_rows - 1) / max_rows;
  std::size_t row = 0;
  for (std::size_t block = 0; block < n_blocks; ++block) {
    const std::size_t rows = job.n_rows / n_blocks + (block < job.n_rows % n_blocks ? 1 : 0);
    std::size_t width = tile_groups(rows);
    std::size_t done = 0;
    while (group + done < group_end) {
      while (group + done + width > group_end) {
        width /= 2;
      }
      const Tile run_tile = find_tile<kBits>(rows, width);
      const std::size_t offset = done * words.group_bytes;
      for (std::size_t step = 0; step < n_steps; step += kFlushSteps) {
        const std::size_t steps = n_steps - step < kFlushSteps ? n_steps - step : kFlushSteps;
        run_tile({words.low + offset + step * kStepBytes<kBits>, words.high + offset + step * 64,
                  words.group_bytes},
                 steps, job.x.bytes + row * job.x.row_bytes + step * kStepPositions<kBits> * 2,
                 job.x.row_bytes, job.x.steps + row,
                 job.y + row * job.y_stride + (group + done) * 16, job.y_stride, step > 0);
      }
      done += width;
    }
    row += rows;
  }
}

template <int kBits>
void run(const Job& job) {
  const std::size_t n_groups = format::group_count(job.m.lanes);
  const std::size_t group_bytes = format::group_words(kBits, job.m.inner) * format::kGroupWordBytes;
  const std::size_t high_plane =
      kBits == 3 ? format::plane_words(2, job.m.inner) * format::kGroupWordBytes : 0;
  const char* const data = static_cast<const char*>(job.m.data);

  if (job.n_rows < kWideRows) {
    for (std::size_t group = 0; group < n_groups; group += kSpanGroups) {
      const std::size_t end = group + kSpanGroups < n_groups ? group + kSpanGroups : n_groups;
      const char* const low = data + group * group_bytes;
      run_groups<kBits>(job, {low, low + high_plane, group_bytes}, group, end, kMaxTileRows);
    }
    return;
  }
  const std::size_t n_steps = (job.m.inner + kStepPositions<kBits> - 1) / kStepPositions<kBits>;
  const std::size_t wide_bytes = wide_group_bytes(job.m.inner);
  for (std::size_t group = 0; group < n_groups; group += kWideGroups) {
    const std::size_t end = group + kWideGroups < n_groups ? group + kWideGroups : n_groups;
    for (std::size_t g = group; g < end; ++g) {
      const char* const low = data + g * group_bytes;
      widen<kBits>(low, low + high_plane, n_steps, job.x.end + (g - group) * wide_bytes);
    }
    run_groups<kWide>(job, {job.x.end, job.x.end, wide_bytes}, group, end, kMaxWideTileRows);
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

}  // namespace zipcache::kernels::avx512
