#include "kernels/cpu/avx512/isa.h"
#include "kernels/cpu/tables.h"

namespace zipcache::kernels::avx512 {
namespace {

void matmul(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows, float* y,
            std::size_t y_stride, Scratch scratch) {
  if (m.bits == 16) {
    matmul_half(m, x, x_stride, n_rows, y, y_stride);
  } else {
    matmul_codes(m, x, x_stride, n_rows, y, y_stride, scratch);
  }
}

}  // namespace

const KernelTable kTable = {"avx512", matmul, mask, max, exp2_sum, axpby, multiply, dot};

}  // namespace zipcache::kernels::avx512
