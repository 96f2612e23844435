// Launchers without checks: cuda_kernels.h is the checked interface. Internal to this room.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <span>

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"

namespace zipcache::cuda {

// Early launches are of sm_90.
inline bool device_starts_early() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

// With `start_early` the kernel may start while the one before it in the stream still
// runs (see ptx::wait_for_launch_before()).
template <typename... Expected, typename... Actual>
cudaError_t launch_kernel_early(bool start_early, void (*kernel)(Expected...), dim3 blocks,
                                int threads, int shared_bytes, cudaStream_t stream,
                                Actual&&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = start_early && device_starts_early() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Actual&&>(arguments)...);
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
  // Allows the kernel `shared_bytes` and says how many of its blocks an SM then holds.
  static cudaError_t prepare(int shared_bytes, int* blocks_per_sm);
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
