// Launchers without checks: cuda_kernels.h is the checked interface. Internal to this room.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <span>

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"

namespace zipcache::cuda {

// Early launches and clusters are of sm_90.
inline bool device_is_sm90() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// What a launch asks for beside its sizes.
struct LaunchAttributes {
  cudaLaunchAttribute of[3]{};
  unsigned count = 0;

  void start_early() {
    of[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    of[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  // Blocks of a cluster may share an SM: with each on one of its own, clusters of 4 leave 8 of an
  // H200's 132 SMs without work.
  void clusters(int n_blocks) {
    of[count].id = cudaLaunchAttributeClusterDimension;
    of[count].val.clusterDim.x = static_cast<unsigned>(n_blocks);
    of[count].val.clusterDim.y = of[count].val.clusterDim.z = 1;
    ++count;
    of[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    of[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
  }
};

// With `start_early` the kernel may start while the one before it in the stream still
// runs (see ptx::wait_for_launch_before()). Blocks come in clusters of `cluster_blocks`.
template <typename... Expected, typename... Actual>
cudaError_t launch_clusters_early(bool start_early, int cluster_blocks, void (*kernel)(Expected...),
                                  dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
                                  Actual&&... arguments) {
  LaunchAttributes attributes;
  if (start_early && device_is_sm90()) {
    attributes.start_early();
  }
  if (cluster_blocks > 1) {
    attributes.clusters(cluster_blocks);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes.of;
  config.numAttrs = attributes.count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Actual&&>(arguments)...);
}
template <typename... Expected, typename... Actual>
cudaError_t launch_kernel_early(bool start_early, void (*kernel)(Expected...), dim3 blocks,
                                int threads, int shared_bytes, cudaStream_t stream,
                                Actual&&... arguments) {
  return launch_clusters_early(start_early, 1, kernel, blocks, threads, shared_bytes, stream,
                               static_cast<Actual&&>(arguments)...);
}
template <typename... Expected, typename... Actual>
cudaError_t launch_kernel(void (*kernel)(Expected...), dim3 blocks, int threads, int shared_bytes,
                          cudaStream_t stream, Actual&&... arguments) {
  return launch_kernel_early(false, kernel, blocks, threads, shared_bytes, stream,
                             static_cast<Actual&&>(arguments)...);
}

// What a kernel takes whose blocks with z = n do problem n of a batch.
template <typename Params>
struct Batch {
  Params of[kMaxBatch];
};
template <typename... Expected, typename Params, typename... Others>
cudaError_t launch_batch(bool start_early, void (*kernel)(Expected...), dim3 blocks, int threads,
                         int shared_bytes, cudaStream_t stream, std::span<const Params> batch,
                         Others... others) {
  Batch<Params> all;
  std::ranges::copy(batch, all.of);
  blocks.z = static_cast<unsigned>(batch.size());
  return launch_kernel_early(start_early, kernel, blocks, threads, shared_bytes, stream, all,
                             others...);
}

// The decode kernel of one head_dim and decode_lane_heads(); instantiated in decode_d*.cu.
template <int kHeadDim, int kLaneHeads>
struct DecodeLauncher {
  // Allows the kernel `shared_bytes` and says how many of its blocks an SM then holds, and how many
  // clusters of kClusterBlocks the device does (0: none).
  static cudaError_t prepare(int shared_bytes, int* blocks_per_sm, int* n_clusters);
  static cudaError_t launch(const DecodeParams& params, const DecodeSharedPlan& plan,
                            cudaStream_t stream);
};

// How many blocks an SM holds. launch_prefill() needs it once per device before.
cudaError_t prepare_prefill(int head_dim, int* blocks_per_sm);
cudaError_t launch_prefill(const PrefillParams& params, cudaStream_t stream);
cudaError_t launch_pack(std::span<const PackParams> batch, int n_pages, cudaStream_t stream);
cudaError_t launch_query_power(std::span<const QueryPowerParams> batch, cudaStream_t stream);
cudaError_t launch_probe(std::span<const ProbeParams> batch, cudaStream_t stream);

}  // namespace zipcache::cuda
