// Launching decode_kernel of one head_dim; instantiated in decode_d*.cu.
#pragma once

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/launch.h"

namespace zipcache::cuda {

template <int kHeadDim, int kLaneHeads>
cudaError_t DecodeLauncher<kHeadDim, kLaneHeads>::prepare(int shared_bytes, int* blocks_per_sm) {
  const cudaError_t error =
      cudaFuncSetAttribute(decode_kernel<kHeadDim, kLaneHeads>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks_per_sm, decode_kernel<kHeadDim, kLaneHeads>, decode_threads(kHeadDim), shared_bytes);
}

template <int kHeadDim, int kLaneHeads>
cudaError_t DecodeLauncher<kHeadDim, kLaneHeads>::launch(const DecodeParams& params,
                                                         const DecodeSharedPlan& plan,
                                                         cudaStream_t stream) {
  return launch_kernel_early(params.start_early, decode_kernel<kHeadDim, kLaneHeads>,
                             dim3(params.n_blocks), decode_threads(kHeadDim),
                             decode_shared_bytes(kHeadDim, plan), stream, params, plan);
}

}  // namespace zipcache::cuda
