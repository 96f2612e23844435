#include "kernels/cuda/decode_launch.cuh"

namespace zipcache::cuda {
template struct DecodeLauncher<64, 1>;
template struct DecodeLauncher<64, 2>;
}  // namespace zipcache::cuda
