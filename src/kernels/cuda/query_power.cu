// Which channels of keys the queries read: sums of q^2. A block owns 64 channels of a KV head, a
// warp of it every 32nd query row. No atomics: the same bits in every run.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {
namespace {

constexpr int kWarps = 32;
constexpr int kBlockChannels = 2 * kWarpLanes;

__global__ void __launch_bounds__(kWarps* kWarpLanes)
    query_power_kernel(const __grid_constant__ QueryPowerParams p) {
  __shared__ float2 sums[kWarps][kWarpLanes];
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int kv_head = blockIdx.y, group = p.n_heads / p.n_kv_heads;
  const int channel = blockIdx.x * kBlockChannels + lane * 2;
  const int n_rows = p.n_queries * group;  // query after query, the heads of the group in each
  float2 sum = {0, 0};
  constexpr int kBatch = 8;  // rows whose loads are under way together
  for (int first = warp; first < n_rows; first += kWarps * kBatch) {
    uint32_t pairs[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int row = first + n * kWarps;
      const int64_t q_row =
          static_cast<int64_t>(row / group) * p.n_heads + kv_head * group + row % group;
      pairs[n] = row < n_rows
                     ? __ldg(reinterpret_cast<const uint32_t*>(p.q + q_row * p.head_dim + channel))
                     : 0;
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const float low = ptx::low_half(pairs[n]), high = ptx::high_half(pairs[n]);
      sum.x = fmaf(low, low, sum.x);
      sum.y = fmaf(high, high, sum.y);
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    float2* to = reinterpret_cast<float2*>(p.power + kv_head * p.head_dim + channel);
    float2 total = p.add ? *to : float2{0, 0};
    for (int of = 0; of < kWarps; ++of) {
      total.x += sums[of][lane].x;
      total.y += sums[of][lane].y;
    }
    *to = total;
  }
}

}  // namespace

cudaError_t launch_query_power(const QueryPowerParams& p, cudaStream_t stream) {
  return launch_kernel(query_power_kernel, dim3(p.head_dim / kBlockChannels, p.n_kv_heads),
                       kWarps * kWarpLanes, 0, stream, p);
}

}  // namespace zipcache::cuda
