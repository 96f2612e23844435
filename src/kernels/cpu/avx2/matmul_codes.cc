#include "kernels/cpu/avx2/codes_product.h"

namespace zipcache::kernels::avx2 {

void matmul_codes(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                  float* y, std::size_t y_stride, Scratch scratch) {
  multiply_codes(m, x, x_stride, n_rows, y, y_stride, scratch);
}

}  // namespace zipcache::kernels::avx2
