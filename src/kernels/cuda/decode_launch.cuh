// Launching decode_kernel of one head_dim; instantiated once per head_dim in decode_d*.cu.
#pragma once

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/launch.h"

namespace zipcache::cuda {

template <int kHeadDim>
cudaError_t DecodeLauncher<kHeadDim>::prepare(int shared_bytes, int* blocks_per_sm) {
  const cudaError_t error = cudaFuncSetAttribute(
      decode_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks_per_sm, decode_kernel<kHeadDim>,
                                                       decode_threads(kHeadDim), shared_bytes);
}

template <int kHeadDim>
cudaError_t DecodeLauncher<kHeadDim>::launch(const DecodeParams& params,
                                             const DecodeSharedPlan& plan, cudaStream_t stream) {
  const int group = params.n_heads / params.n_kv_heads;
  return launch_kernel_early(params.start_early, decode_kernel<kHeadDim>, dim3(params.n_blocks),
                             decode_threads(kHeadDim), decode_shared_bytes(kHeadDim, group, plan),
                             stream, params, plan);
}

}  // namespace zipcache::cuda
