// The product in plain loops, for any processor. Each (row, lane) adds the inner positions in
// ascending order in fp32.
#include "base/half.h"
#include "format/code_layout.h"
#include "kernels/cpu/scalar/scalar.h"

namespace zipcache::kernels::scalar {
namespace {

constexpr std::size_t kLanes = format::kLanesPerGroup;

// Bits of inner position `i`, lane `lane`, in a plane of `plane_bits` bits of one lane group.
std::uint32_t plane_code(const std::uint32_t* plane, int plane_bits, std::size_t i,
                         std::size_t lane) {
  const std::size_t per_word = format::positions_per_word(plane_bits);
  const std::size_t place = i % per_word;
  const std::size_t shift = 8 * (place % 4) + static_cast<std::size_t>(plane_bits) * (place / 4);
  return plane[i / per_word * kLanes + lane] >> shift & ((1u << plane_bits) - 1u);
}

void load_codes(const std::uint32_t* group, int bits, std::size_t inner, std::size_t i,
                float* codes) {
  const std::uint32_t* const high_plane = group + format::plane_words(2, inner) * kLanes;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const std::uint32_t code =
        bits == 3 ? plane_code(group, 2, i, lane) | plane_code(high_plane, 1, i, lane) << 2
                  : plane_code(group, bits, i, lane);
    codes[lane] = static_cast<float>(code);
  }
}

// y[row][lane] += x[row][i] * column[lane].
void add_column(const float* column, std::size_t lanes, std::size_t i, const float* x,
                std::size_t x_stride, std::size_t n_rows, float* y, std::size_t y_stride) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float factor = x[row * x_stride + i];
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      y[row * y_stride + lane] += factor * column[lane];
    }
  }
}

}  // namespace

void matmul(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows, float* y,
            std::size_t y_stride, Scratch /*scratch*/) {
  for (std::size_t row = 0; row < n_rows; ++row) {
    for (std::size_t lane = 0; lane < m.lanes; ++lane) {
      y[row * y_stride + lane] = 0.0f;
    }
  }
  const std::size_t group_words = m.bits == 16 ? 0 : format::group_words(m.bits, m.inner) * kLanes;
  for (std::size_t first = 0; first < m.lanes; first += kLanes) {
    const std::size_t lanes = m.lanes - first < kLanes ? m.lanes - first : kLanes;
    for (std::size_t i = 0; i < m.inner; ++i) {
      float column[kLanes];
      if (m.bits == 16) {
        const auto* const halves = static_cast<const Half*>(m.data) + i * m.half_stride + first;
        for (std::size_t lane = 0; lane < lanes; ++lane) {
          column[lane] = half_to_float(halves[lane]);
        }
      } else {
        const auto* const group =
            static_cast<const std::uint32_t*>(m.data) + first / kLanes * group_words;
        load_codes(group, m.bits, m.inner, i, column);
      }
      add_column(column, lanes, i, x, x_stride, n_rows, y + first, y_stride);
    }
  }
}

}  // namespace zipcache::kernels::scalar
