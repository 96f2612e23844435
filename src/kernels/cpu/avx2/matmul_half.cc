// Product of rows of x with an fp16 matrix: a register-blocked GEMM in fp32. Each (row, lane) has
// one accumulator that adds the inner positions in ascending order, so a result depends neither on
// the number of rows nor on where its lane stands.
#include "kernels/cpu/avx2/isa.h"

namespace zipcache::kernels::avx2 {
namespace {

constexpr std::size_t kMaxTileRows = 6;
// How many inner positions ahead memory is asked for: a tile reads a few lines of every row, which
// the hardware does not follow. A matrix in memory, 4 rows x 256 lanes x 128: 12.7 us without, 10.4
// us with; a matrix in cache: no difference.
constexpr std::size_t kPrefetchRows = 32;

[[gnu::always_inline]] inline __m256 load_column(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// y[row][8 * kVectors lanes] = sum over inner of x[row][inner] * m[inner][lanes].
template <int kRows, int kVectors>
void tile(const std::uint16_t* m, std::size_t half_stride, std::size_t inner, const float* x,
          std::size_t x_stride, float* y, std::size_t y_stride) {
  __m256 sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[row][v] = _mm256_setzero_ps();
    }
  }
  // Rows 3, 4 and 5 from a second base: x86 addresses reach base, base + stride, base + 2 * stride.
  const float* base[2] = {x, x + (kRows > 3 ? 3 : 0) * x_stride};
  const std::size_t ahead = kPrefetchRows * half_stride;
  for (std::size_t i = 0; i < inner; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 4) {
      _mm_prefetch(m + ahead + v * 8, _MM_HINT_T0);
    }
    // The shorter side stays in registers, the longer one passes through: 3 rows x 4 vectors
    // need 16.
    if constexpr (kRows < kVectors) {
      __m256 factor[kRows];
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        factor[row] = _mm256_set1_ps(base[row / 3][(row % 3) * x_stride]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256 column = load_column(m + v * 8);
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          sum[row][v] = _mm256_fmadd_ps(factor[row], column, sum[row][v]);
        }
      }
    } else {
      __m256 column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        column[v] = load_column(m + v * 8);
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const __m256 factor = _mm256_set1_ps(base[row / 3][(row % 3) * x_stride]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          sum[row][v] = _mm256_fmadd_ps(factor, column[v], sum[row][v]);
        }
      }
    }
    m += half_stride;
    ++base[0];
    ++base[1];
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_ps(y + row * y_stride + v * 8, sum[row][v]);
    }
  }
}

using Tile = void (*)(const std::uint16_t*, std::size_t, std::size_t, const float*, std::size_t,
                      float*, std::size_t);

// At least 8 accumulators hide the latency of an FMA (4 cycles, 2 per cycle), 12 at most leave
// registers for columns and factors.
constexpr std::size_t tile_vectors(std::size_t rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

Tile find_tile(std::size_t rows, std::size_t vectors) {
  static constexpr Tile kFours[4] = {nullptr, tile<1, 4>, tile<2, 4>, tile<3, 4>};
  static constexpr Tile kPairs[kMaxTileRows + 1] = {nullptr,    tile<1, 2>, tile<2, 2>, tile<3, 2>,
                                                    tile<4, 2>, tile<5, 2>, tile<6, 2>};
  static constexpr Tile kSingles[kMaxTileRows + 1] = {
      nullptr, tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>};
  switch (vectors) {
    case 8:
      return tile<1, 8>;
    case 4:
      return kFours[rows];
    case 2:
      return kPairs[rows];
    default:
      return kSingles[rows];
  }
}

// Fewer than 8 lanes: copied into rows of 8, because a vector load would read past the last row of
// the matrix. Once for all query rows: copied for each, two sinks took 8 % of reading a prompt.
void narrow_matrix(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                   float* y, std::size_t y_stride) {
  constexpr std::size_t kLanes = 8, kPart = 512;  // no head is larger
  const auto* const data = static_cast<const std::uint16_t*>(m.data);
  alignas(32) std::uint16_t part[kPart * kLanes] = {};
  alignas(32) float sums[kMaxTileRows * kLanes];
  for (std::size_t begin = 0; begin == 0 || begin < m.inner; begin += kPart) {
    const std::size_t inner = m.inner - begin < kPart ? m.inner - begin : kPart;
    for (std::size_t i = 0; i < inner; ++i) {
      for (std::size_t lane = 0; lane < m.lanes; ++lane) {
        part[i * kLanes + lane] = data[(begin + i) * m.half_stride + lane];
      }
    }
    for (std::size_t row = 0; row < n_rows; row += kMaxTileRows) {
      const std::size_t rows = n_rows - row < kMaxTileRows ? n_rows - row : kMaxTileRows;
      find_tile(rows, 1)(part, kLanes, inner, x + row * x_stride + begin, x_stride, sums, kLanes);
      for (std::size_t r = 0; r < rows; ++r) {
        float* const to = y + (row + r) * y_stride;
        const __m256 sum = _mm256_load_ps(sums + r * kLanes);
        _mm256_storeu_ps(to, begin == 0 ? sum : _mm256_add_ps(_mm256_loadu_ps(to), sum));
      }
    }
  }
}

}  // namespace

void matmul_half(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                 float* y, std::size_t y_stride) {
  const auto* const data = static_cast<const std::uint16_t*>(m.data);
  if (m.lanes < 8) {
    if (m.lanes > 0) {
      narrow_matrix(m, x, x_stride, n_rows, y, y_stride);
    }
    return;
  }
  const std::size_t n_blocks = (n_rows + kMaxTileRows - 1) / kMaxTileRows;
  const std::size_t rows_per_block = n_blocks == 0 ? 0 : (n_rows + n_blocks - 1) / n_blocks;

  // Lanes outside, rows inside: a slab of lanes stays in the first-level cache for all rows.
  std::size_t lane = 0;
  while (lane < m.lanes) {
    std::size_t width = tile_vectors(rows_per_block);
    while (width > 1 && lane + width * 8 > m.lanes) {
      width /= 2;
    }
    // The last vector overlaps the one before it and writes the same results once more.
    const std::size_t start = lane + width * 8 > m.lanes ? m.lanes - 8 : lane;
    std::size_t row = 0;
    for (std::size_t block = 0; block < n_blocks; ++block) {
      const std::size_t rows = n_rows / n_blocks + (block < n_rows % n_blocks ? 1 : 0);
      find_tile(rows, width)(data + start, m.half_stride, m.inner, x + row * x_stride, x_stride,
                             y + row * y_stride + start, y_stride);
      row += rows;
    }
    lane += width * 8;
  }
}

}  // namespace zipcache::kernels::avx2
