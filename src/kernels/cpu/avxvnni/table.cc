// AVX2's kernels with the dot product of AVX-VNNI. The code is tested (evex_table.cc); its encoding
// has not run on hardware yet.
#include "kernels/cpu/avx2/codes_product.h"
#include "kernels/cpu/tables.h"

#ifndef ZIPCACHE_AVXVNNI_TABLE
#define ZIPCACHE_AVXVNNI_TABLE kTable
#endif

namespace zipcache::kernels::avxvnni {
namespace {

void matmul(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows, float* y,
            std::size_t y_stride, Scratch scratch) {
  if (m.bits == 16) {
    avx2::matmul_half(m, x, x_stride, n_rows, y, y_stride);
  } else {
    avx2::multiply_codes(m, x, x_stride, n_rows, y, y_stride, scratch);
  }
}

}  // namespace

extern const KernelTable ZIPCACHE_AVXVNNI_TABLE = {"avxvnni",      matmul,         avx2::mask,
                                                   avx2::max,      avx2::exp2_sum, avx2::axpby,
                                                   avx2::multiply, avx2::dot};

}  // namespace zipcache::kernels::avxvnni
