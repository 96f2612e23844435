#include <cuda_runtime.h>

#include <string>

#include "base/check.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/window_kernels.h"

namespace zipcache::cuda {
namespace {

constexpr int kThreads = 256, kHeadThreads = 128;
constexpr HalfBits kMinusInfinity = 0xfc00;

__device__ __forceinline__ HalfBits to_half(float x) {
  return static_cast<HalfBits>(ptx::pack_half2(x, 0));
}

__global__ void __launch_bounds__(kThreads)
    summary_kernel(const __grid_constant__ MaskSummaryParams p) {
  const int cell = blockIdx.x * kThreads + threadIdx.x, plane = blockIdx.y;
  const HalfBits* const mask = p.mask + plane * p.plane_stride;
  bool any = false, all = true;
  for (int row = 0; row < p.n_rows; ++row) {
    const bool seen = cell < p.n_cells && mask[row * p.row_stride + cell] != kMinusInfinity;
    any |= seen;
    all &= seen;
    const int n = __syncthreads_count(seen);
    if (threadIdx.x == 0 && n > 0) {
      atomicAdd(reinterpret_cast<uint32_t*>(p.row_counts) + plane * p.n_rows + row,
                static_cast<uint32_t>(n));
    }
  }
  if (cell < p.n_cells) {
    p.flags[static_cast<int64_t>(plane) * p.n_cells + cell] =
        (any ? kSeenByAny : 0) | (all ? kSeenByAll : 0);
  }
}

// A block per token and head.
__global__ void __launch_bounds__(kHeadThreads)
    ingest_kernel(const __grid_constant__ IngestParams p) {
  const int token = blockIdx.x, sequence = token / p.n_per_sequence, head = blockIdx.y;
  const int64_t to = sequence * p.to.sequence_stride + p.place[token] * p.to.token_stride +
                     head * p.to.head_stride;
  const float* const k = p.k + token * p.k_stride + head * p.head_dim;
  const float* const v = p.v + token * p.v_stride + head * p.head_dim;
  for (int n = threadIdx.x; n < p.head_dim; n += kHeadThreads) {
    p.to.k[to + n] = to_half(k[n]);
    p.to.v[to + n] = to_half(v[n]);
  }
}

__global__ void __launch_bounds__(kThreads)
    move_kernel(const __grid_constant__ Batch<MoveParams> batch) {
  const MoveParams& p = batch.of[blockIdx.z];
  const int64_t from = p.from[blockIdx.x] * p.source.token_stride;
  const int64_t to = p.to[blockIdx.x] * p.target.token_stride;
  const int units = p.head_dim / 8;
  for (int n = threadIdx.x; n < p.n_kv_heads * units; n += kThreads) {
    const int64_t head = n / units, within = n % units * 8;
    const int64_t read = from + head * p.source.head_stride + within;
    const int64_t write = to + head * p.target.head_stride + within;
    *reinterpret_cast<uint4*>(p.target.k + write) =
        *reinterpret_cast<const uint4*>(p.source.k + read);
    *reinterpret_cast<uint4*>(p.target.v + write) =
        *reinterpret_cast<const uint4*>(p.source.v + read);
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_probes_kernel(const __grid_constant__ GatherProbesParams p) {
  const int probe = blockIdx.x, row = p.rows[probe];
  for (int n = threadIdx.x; n < p.n_heads * p.head_dim; n += kThreads) {
    p.probe_q[static_cast<int64_t>(probe) * p.n_heads * p.head_dim + n] =
        to_half(p.q[row * p.q_query_stride + n / p.head_dim * p.q_head_stride + n % p.head_dim]);
  }
  for (int head = threadIdx.x; head < p.n_heads; head += kThreads) {
    p.probe_lse[probe * p.n_heads + head] = p.lse[static_cast<int64_t>(row) * p.n_heads + head];
  }
}

// A token's rank is the number of tokens before it: n^2 comparisons are nothing for a block of 512.
__global__ void __launch_bounds__(kThreads)
    rank_kernel(const __grid_constant__ Batch<RankParams> batch) {
  const RankParams& p = batch.of[blockIdx.z];
  __shared__ float scores[kMaxRankTokens];
  const int head = blockIdx.y;
  for (int n = threadIdx.x; n < p.n_tokens; n += kThreads) {
    const float score = p.saliency[head * p.head_stride + n];
    scores[n] = score == score ? score : -INFINITY;
  }
  __syncthreads();
  const int token = blockIdx.x * kThreads + threadIdx.x;
  if (token >= p.n_tokens) {
    return;
  }
  const float mine = scores[token];
  int rank = 0;
  for (int other = 0; other < p.n_tokens; ++other) {
    rank += scores[other] > mine || (scores[other] == mine && other > token);
  }
  p.order[static_cast<int64_t>(head) * p.n_tokens + rank] = token;
  p.kept[head * p.kept_stride + rank] = static_cast<uint16_t>(token);
}

__global__ void __launch_bounds__(kPageTokens)
    page_cells_kernel(const __grid_constant__ PageCellsParams p) {
  const PageSource page = p.pages[blockIdx.x];
  const int slot = threadIdx.x;
  p.page_cells[static_cast<int64_t>(blockIdx.x) * kPageTokens + slot] =
      slot < static_cast<int>(page.tokens)
          ? p.block_cells[page.cells + p.kept[static_cast<int64_t>(page.ranks) + slot]]
          : -1;
}

Status to_status(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    return unsupported(std::string("cuda ") + what + ": " + cudaGetErrorString(error));
  }
  return ok_status();
}
template <typename Params>
Status run(void (*kernel)(Params), dim3 blocks, int threads, const Params& params, Stream stream,
           const char* what) {
  if (blocks.x == 0 || blocks.y == 0) {
    return ok_status();
  }
  return to_status(launch_kernel(kernel, blocks, threads, 0, stream, params), what);
}
template <typename Params>
Status run(void (*kernel)(Batch<Params>), dim3 blocks, int threads, std::span<const Params> batch,
           Stream stream, const char* what) {
  ZC_CHECK(!batch.empty() && batch.size() <= kMaxBatch);
  if (blocks.x == 0 || blocks.y == 0) {
    return ok_status();
  }
  return to_status(launch_batch(false, kernel, blocks, threads, 0, stream, batch), what);
}

}  // namespace

Status summarize_mask(const MaskSummaryParams& p, Stream stream) {
  return run(summary_kernel, dim3((p.n_cells + kThreads - 1) / kThreads, p.n_planes), kThreads, p,
             stream, "mask summary");
}

Status ingest(const IngestParams& p, Stream stream) {
  return run(ingest_kernel, dim3(p.n_sequences * p.n_per_sequence, p.n_kv_heads), kHeadThreads, p,
             stream, "ingest");
}

Status move_rows(std::span<const MoveParams> batch, Stream stream) {
  return run(move_kernel, dim3(batch[0].n_tokens), kThreads, batch, stream, "move rows");
}

Status gather_probes(const GatherProbesParams& p, Stream stream) {
  return run(gather_probes_kernel, dim3(p.n_probes), kThreads, p, stream, "gather probes");
}

Status rank_tokens(std::span<const RankParams> batch, Stream stream) {
  const RankParams& p = batch[0];
  if (p.n_tokens > kMaxRankTokens) {
    return unsupported("cuda rank: required " + std::to_string(p.n_tokens) +
                       " tokens in a block, supported up to " + std::to_string(kMaxRankTokens));
  }
  return run(rank_kernel, dim3((p.n_tokens + kThreads - 1) / kThreads, p.n_kv_heads), kThreads,
             batch, stream, "rank");
}

Status list_page_cells(const PageCellsParams& p, Stream stream) {
  return run(page_cells_kernel, dim3(p.n_pages), kPageTokens, p, stream, "page cells");
}

}  // namespace zipcache::cuda
