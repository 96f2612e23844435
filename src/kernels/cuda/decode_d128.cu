#include "kernels/cuda/decode_launch.cuh"

namespace zipcache::cuda {
template struct DecodeLauncher<128>;
}  // namespace zipcache::cuda
