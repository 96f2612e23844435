#include "kernels/cuda/decode_launch.cuh"

namespace zipcache::cuda {
template struct DecodeLauncher<128, 1>;
template struct DecodeLauncher<128, 2>;
}  // namespace zipcache::cuda
