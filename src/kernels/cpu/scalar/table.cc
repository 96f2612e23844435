#include "kernels/cpu/scalar/scalar.h"
#include "kernels/cpu/tables.h"

namespace zipcache::kernels::scalar {

const KernelTable kTable = {"scalar", matmul, mask, max, exp2_sum, axpby, multiply, dot};

}  // namespace zipcache::kernels::scalar
