// Appends a token to the fp16 tail of every sequence: one block per sequence, 16 bytes per thread.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"

namespace zipcache::cuda {
namespace {

constexpr int kAppendThreads = 256;

__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ AppendParams p) {
  const int sequence = blockIdx.x;
  const int n_used = p.tail_tokens[sequence];
  if (n_used >= kTailTokens) {
    return;
  }
  const int units = p.head_dim / 8;
  for (int n = threadIdx.x; n < p.n_kv_heads * units; n += kAppendThreads) {
    const int64_t row = static_cast<int64_t>(sequence) * p.n_kv_heads + n / units;
    const int64_t from = row * units + n % units;
    const int64_t to = (row * kTailTokens + n_used) * units + n % units;
    reinterpret_cast<uint4*>(p.tail_k)[to] = reinterpret_cast<const uint4*>(p.k)[from];
    reinterpret_cast<uint4*>(p.tail_v)[to] = reinterpret_cast<const uint4*>(p.v)[from];
  }
  __syncthreads();  // every thread has read the count
  if (threadIdx.x == 0) {
    p.tail_tokens[sequence] = n_used + 1;
  }
}

}  // namespace

cudaError_t launch_append(const AppendParams& p, cudaStream_t stream) {
  return launch_kernel(append_kernel, dim3(p.n_sequences), kAppendThreads, 0, stream, p);
}

}  // namespace zipcache::cuda
