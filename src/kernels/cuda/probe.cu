// Saliency of prompt tokens from probe rows: column sums of exp2(score - lse), divided by the
// number of probes that see the token (paper section 4.3). Only Q K^T is computed: the probe rows'
// lse comes from the attention pass.
//
// A block owns 256 keys of a KV head, 32 per warp, as matrix operands in registers; it streams the
// probe rows of the head's query group through shared memory. Sums stay in registers: no atomics,
// no memory that grows with the product of tokens and probes, and the same bits in every run.
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {
namespace {

constexpr int kProbeWarps = 8;
constexpr int kProbeThreads = kProbeWarps * kWarpLanes;
constexpr int kBlockKeys = kProbeWarps * 32;
constexpr int kTileColumns = 128;  // (probe, query head) pairs per stage

// [two stages of query rows][two stages of (lse, position) of columns][where columns come from]
__host__ __device__ constexpr int stage_bytes(int head_dim) { return kTileColumns * head_dim * 2; }
constexpr int probe_shared_bytes(int head_dim) {
  return 2 * stage_bytes(head_dim) + 2 * kTileColumns * 8 + kTileColumns * 8;
}

// First probe that sees `token`.
__device__ __forceinline__ int first_seeing(const ProbeParams& p, int token) {
  int low = 0, high = p.n_probes;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(p.positions + middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A warp's 32 keys in registers, and their products with columns of a stage. A stage is rows of
// query heads in units of 16 bytes, placed so that the reads meet different banks: column `row`,
// unit `unit` of it is at unit_of().
#if __CUDA_ARCH__ >= 900
// Four warps at a time, columns straight from shared memory: twice the rate of single warps.
template <int kHeadDim>
struct KeyProduct {
  static constexpr int kColumns = 32;  // at once
  uint32_t keys[2][kHeadDim / 16][4];

  static __device__ __forceinline__ int unit_of(int row, int unit) {
    return (unit / 8 * kTileColumns + row) * 8 + ((unit ^ row) & 7);
  }
  // Of tokens g + 8n, from `from`.
  __device__ __forceinline__ void load(const HalfBits* from, int n, int lane) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const auto* pairs = reinterpret_cast<const uint32_t*>(from + step * 16) + (lane & 3);
      keys[n / 2][step][n % 2] = __ldg(pairs);
      keys[n / 2][step][2 + n % 2] = __ldg(pairs + 4);
    }
  }
  __device__ __forceinline__ void multiply(const uint8_t* stage, int first, int /*lane*/,
                                           float (&s)[2][kColumns / 8][4]) const {
    ptx::warpgroup_begin(s);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const uint64_t columns = ptx::swizzled_operand(
          stage + (step / 4 * kTileColumns + first) * 128 + step % 4 * 32);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        ptx::warpgroup_mma_64x32x16(s[block], keys[block][step], columns, step > 0);
      }
    }
    ptx::warpgroup_end(s);
  }
};
#else
template <int kHeadDim>
struct KeyProduct {
  static constexpr int kColumns = 16;  // at once: four independent sums
  static constexpr int kUnits = kHeadDim / 8;
  uint32_t keys[2][kHeadDim / 16][4];

  // Odd rows swap the halves of every 128 bytes, so that the 8 lanes of one phase of a load (2 rows
  // x 64 bytes) meet 8 different bank groups.
  static __device__ __forceinline__ int unit_of(int row, int unit) {
    return row * kUnits + (unit ^ ((row & 1) << 2));
  }
  __device__ __forceinline__ void load(const HalfBits* from, int n, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < kHeadDim / 32; ++chunk) {
      const uint4 x = ptx::load_16(from + chunk * 32 + (lane & 3) * 8);
      keys[n / 2][chunk * 2][n % 2] = x.x, keys[n / 2][chunk * 2][2 + n % 2] = x.y;
      keys[n / 2][chunk * 2 + 1][n % 2] = x.z, keys[n / 2][chunk * 2 + 1][2 + n % 2] = x.w;
    }
  }
  __device__ __forceinline__ void multiply(const uint8_t* stage, int first, int lane,
                                           float (&s)[2][kColumns / 8][4]) const {
#pragma unroll
    for (int n = 0; n < 4 * kColumns; ++n) {
      s[n / (kColumns / 2)][n / 4 % (kColumns / 8)][n % 4] = 0;
    }
#pragma unroll
    for (int chunk = 0; chunk < kHeadDim / 32; ++chunk) {
#pragma unroll
      for (int of = 0; of < kColumns / 8; ++of) {
        const uint4 q = *reinterpret_cast<const uint4*>(
            stage + unit_of(first + of * 8 + (lane >> 2), chunk * 4 + (lane & 3)) * 16);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          ptx::mma_16x8x16(s[block][of], keys[block][chunk * 2], q.x, q.y);
          ptx::mma_16x8x16(s[block][of], keys[block][chunk * 2 + 1], q.z, q.w);
        }
      }
    }
  }
};
#endif

template <int kHeadDim>
__global__ void __launch_bounds__(kProbeThreads, kHeadDim == 256 ? 1 : 2)
    probe_kernel(const __grid_constant__ ProbeParams p) {
  uint8_t* const shared = ptx::dynamic_shared();
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int g = lane >> 2, i = lane & 3;
  const int kv_head = blockIdx.y, group = p.n_heads / p.n_kv_heads;
  const int block_key = blockIdx.x * kBlockKeys, first_key = block_key + warp * 32;
  const int tile_probes = kTileColumns / group;  // a tile has whole probes

  using Product = KeyProduct<kHeadDim>;
  Product product;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int64_t token = min(first_key + n * 8 + g, p.n_tokens - 1);
    product.load(p.k + token * p.token_stride + static_cast<int64_t>(kv_head) * kHeadDim, n, lane);
  }

  constexpr int kUnits = kHeadDim / 8;
  float2* columns = reinterpret_cast<float2*>(shared + 2 * stage_bytes(kHeadDim));
  // Of every column: its probe in the tile, and its head among all query heads. Looked up: dividing
  // by the group in every stage cost 6 % of the kernel.
  int2* sources = reinterpret_cast<int2*>(columns + 2 * kTileColumns);
  if (threadIdx.x < kTileColumns) {
    const int column = min(static_cast<int>(threadIdx.x), tile_probes * group - 1);
    sources[threadIdx.x] = {column / group, kv_head * group + column % group};
  }
  __syncthreads();
  const auto fetch = [&](int tile, int stage) {
    uint8_t* to = shared + stage * stage_bytes(kHeadDim);
    for (int n = threadIdx.x; n < kTileColumns * kUnits; n += kProbeThreads) {
      const int row = n / kUnits, unit = n % kUnits;
      const int2 source = sources[row];
      const int probe = min(tile * tile_probes + source.x, p.n_probes - 1);
      const int64_t q_row = static_cast<int64_t>(probe) * p.n_heads + source.y;
      ptx::copy_16(ptx::shared_address(to + Product::unit_of(row, unit) * 16),
                   p.q + q_row * kHeadDim + unit * 8);
    }
    if (threadIdx.x < kTileColumns) {
      const int2 source = sources[threadIdx.x];
      const int probe = tile * tile_probes + source.x;
      float2 about = {INFINITY, __int_as_float(0x7fffffff)};  // a weight of zero
      if (probe < p.n_probes && threadIdx.x < tile_probes * group) {
        about.x = __ldg(p.lse + static_cast<int64_t>(probe) * p.n_heads + source.y);
        about.y = __int_as_float(__ldg(p.positions + probe));
      }
      columns[stage * kTileColumns + threadIdx.x] = about;
    }
    ptx::commit_copies();
  };

  const float log2_scale = p.scale * 1.44269504088896f;
  const int n_tiles = (p.n_probes + tile_probes - 1) / tile_probes;
  const int first_tile = first_seeing(p, block_key) / tile_probes;
  float sums[4] = {0, 0, 0, 0};
  if (first_tile < n_tiles) {
    fetch(first_tile, 0);
  }
  for (int tile = first_tile; tile < n_tiles; ++tile) {
    const int stage = (tile - first_tile) & 1;
    if (tile + 1 < n_tiles) {
      fetch(tile + 1, stage ^ 1);
      ptx::wait_copies<1>();
    } else {
      ptx::wait_copies<0>();
    }
    ptx::fence_async_proxy();
    __syncthreads();
    const uint8_t* rows = shared + stage * stage_bytes(kHeadDim);
    // Positions ascend: if the tile's first probe sees the warp's last key, all see all.
    const bool masked = __float_as_int(columns[stage * kTileColumns].y) < first_key + 31;
    float s[2][Product::kColumns / 8][4] = {};
#pragma unroll 1
    for (int first = 0; first < kTileColumns; first += Product::kColumns) {
      product.multiply(rows, first, lane, s);
#pragma unroll
      for (int of = 0; of < Product::kColumns / 8; ++of) {
        const float4 about = *reinterpret_cast<const float4*>(columns + stage * kTileColumns +
                                                              first + of * 8 + i * 2);
        const float lse[2] = {about.x, about.z};
        float weights[2][4];
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          weights[n % 2][n / 2] = ptx::exp2(fmaf(s[n / 4][of][n % 4], log2_scale, -lse[n % 2]));
        }
        if (masked) {
          const int position[2] = {__float_as_int(about.y), __float_as_int(about.w)};
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            weights[n % 2][n / 2] =
                position[n % 2] < first_key + n / 2 * 8 + g ? 0.0f : weights[n % 2][n / 2];
          }
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          sums[n] += weights[0][n] + weights[1][n];
        }
      }
    }
    __syncthreads();  // the stage is free
  }

#pragma unroll
  for (int n = 0; n < 4; ++n) {
    sums[n] += __shfl_xor_sync(ptx::kFullWarp, sums[n], 1);
    sums[n] += __shfl_xor_sync(ptx::kFullWarp, sums[n], 2);
    const int token = first_key + n * 8 + g;
    if (i == 0 && token < p.n_tokens) {
      const int n_seeing = p.n_probes - first_seeing(p, token);
      p.saliency[static_cast<int64_t>(kv_head) * p.n_tokens + token] =
          n_seeing > 0 ? sums[n] / static_cast<float>(n_seeing * group) : 0.0f;
    }
  }
}

template <int kHeadDim>
cudaError_t launch(const ProbeParams& p, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(probe_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           probe_shared_bytes(kHeadDim));
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 grid((p.n_tokens + kBlockKeys - 1) / kBlockKeys, p.n_kv_heads);
  return launch_kernel(probe_kernel<kHeadDim>, grid, kProbeThreads, probe_shared_bytes(kHeadDim),
                       stream, p);
}

}  // namespace

cudaError_t launch_probe(const ProbeParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return launch<64>(p, stream);
    case 128:
      return launch<128>(p, stream);
    default:
      return launch<256>(p, stream);
  }
}

}  // namespace zipcache::cuda
