// Which channels of keys the queries read: sums of q^2. A block owns 64 channels of a KV head, a
// warp of it every 32nd query row. No atomics: the same bits in every run.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kPairs = 8;  // of channels
constexpr int kRows = kThreads / kPairs;

__global__ void __launch_bounds__(kThreads)
    query_power_kernel(const __grid_constant__ Batch<QueryPowerParams> batch) {
  const QueryPowerParams& p = batch.of[blockIdx.z];
  __shared__ float2 sums[kRows][kPairs];
  const int pair = threadIdx.x % kPairs, own = threadIdx.x / kPairs;
  const int kv_head = blockIdx.y, group = p.n_heads / p.n_kv_heads;
  const int channel = (blockIdx.x * kPairs + pair) * 2;
  const int n_rows = p.n_queries * group;  // query after query, the heads of the group in each
  float2 sum = {0, 0};
  constexpr int kBatch = 8;  // rows whose loads are under way together
  for (int first = own; first < n_rows; first += kRows * kBatch) {
    uint32_t pairs[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int row = first + n * kRows;
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
  sums[own][pair] = sum;
  for (int half = kRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (own < half) {
      sums[own][pair].x += sums[own + half][pair].x;
      sums[own][pair].y += sums[own + half][pair].y;
    }
  }
  if (own == 0) {
    float2* to = reinterpret_cast<float2*>(p.power + kv_head * p.head_dim + channel);
    const float2 before = p.add ? *to : float2{0, 0};
    *to = {before.x + sums[0][pair].x, before.y + sums[0][pair].y};
  }
}

}  // namespace

cudaError_t launch_query_power(std::span<const QueryPowerParams> batch, cudaStream_t stream) {
  const dim3 blocks(batch[0].head_dim / (2 * kPairs), batch[0].n_kv_heads);
  return launch_batch(false, query_power_kernel, blocks, kThreads, 0, stream, batch);
}

}  // namespace zipcache::cuda
