#include "kernels/cuda/decode_launch.cuh"

namespace zipcache::cuda {
template struct DecodeLauncher<256>;
}  // namespace zipcache::cuda
