// Launching decode_kernel of one head_dim; instantiated in decode_d*.cu.
#pragma once

#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/launch.h"

namespace zipcache::cuda {

template <int kHeadDim, int kLaneHeads>
cudaError_t DecodeLauncher<kHeadDim, kLaneHeads>::prepare(int shared_bytes, int* blocks_per_sm,
                                                          int* n_clusters) {
  cudaError_t error =
      cudaFuncSetAttribute(decode_kernel<kHeadDim, kLaneHeads>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      blocks_per_sm, decode_kernel<kHeadDim, kLaneHeads>, decode_threads(kHeadDim), shared_bytes);
  *n_clusters = 0;
  if (error != cudaSuccess || !device_is_sm90() || !decode_has_clusters(kLaneHeads)) {
    return error;
  }
  LaunchAttributes attributes;
  attributes.clusters(kClusterBlocks);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kClusterBlocks);
  config.blockDim = dim3(decode_threads(kHeadDim));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = attributes.of;
  config.numAttrs = attributes.count;
  return cudaOccupancyMaxActiveClusters(n_clusters, decode_kernel<kHeadDim, kLaneHeads>, &config);
}

template <int kHeadDim, int kLaneHeads>
cudaError_t DecodeLauncher<kHeadDim, kLaneHeads>::launch(const DecodeParams& params,
                                                         const DecodeSharedPlan& plan,
                                                         cudaStream_t stream) {
  return launch_clusters_early(params.start_early, params.cluster_blocks,
                               decode_kernel<kHeadDim, kLaneHeads>, dim3(params.n_blocks),
                               decode_threads(kHeadDim), decode_shared_bytes(kHeadDim, plan),
                               stream, params, plan);
}

}  // namespace zipcache::cuda
