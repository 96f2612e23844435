#include "kernels/cuda/decode_launch.cuh"

namespace zipcache::cuda {
template struct DecodeLauncher<256, 1>;
template struct DecodeLauncher<256, 2>;
}  // namespace zipcache::cuda
