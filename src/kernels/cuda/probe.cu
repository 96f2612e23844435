// Saliency of prompt tokens from probe rows: column sums of exp2(score - lse), divided by the
// number of probes that see the token (paper section 4.3). Only Q K^T is computed: the probe rows'
// lse comes from the attention pass.
//
// A block owns 256 keys of a KV head, 32 per warp, as matrix operands in registers; it streams the
// probe rows of the head's query group through shared memory. Sums stay in registers: no atomics,
// no memory that grows with the product of tokens and probes, and the same bits in every run.
#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {
namespace {

constexpr int kProbeWarps = 8;
constexpr int kProbeThreads = kProbeWarps * kWarpLanes;
constexpr int kWarpKeys = 32;
constexpr int kBlockKeys = kProbeWarps * kWarpKeys;
constexpr int kTileColumns = 128;  // (probe, query head) pairs per stage

// [two stages of query rows][two stages of (lse, position) of columns]
__host__ __device__ constexpr int stage_bytes(int head_dim) { return kTileColumns * head_dim * 2; }
constexpr int probe_shared_bytes(int head_dim) {
  return 2 * stage_bytes(head_dim) + 2 * kTileColumns * 8;
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

// A warp's keys in registers, and their products with the columns of a stage. A stage is rows of
// query heads in units of 16 bytes, placed so that the reads meet different banks: unit `unit` of
// column `row` is at unit_of(). for_products() calls use(first, block, s) for some columns from
// `first` on and every 16 keys: s[n] of columns first + 8n and on, as mma_16x8x16 leaves it.
#if __CUDA_ARCH__ >= 900
// Four warps at a time, columns straight from shared memory: twice the rate of single warps. While
// the products of some columns are under way, the warp does what follows those before.
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
  // `stage`: swizzled_operand() of its start.
  __device__ __forceinline__ void begin(uint32_t stage, int first, int block,
                                        float (&s)[kColumns / 8][4]) const {
    ptx::warpgroup_begin(s);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int row = step / 4 * kTileColumns + first;
      ptx::warpgroup_mma(s, keys[block][step], stage + row * 8 + step % 4 * 2, step > 0);
    }
    ptx::warpgroup_commit();
  }
  template <typename Use>
  __device__ __forceinline__ void for_products(const uint8_t* rows, int /*lane*/, Use use) const {
    const uint32_t stage = ptx::swizzled_operand(rows);
    float s[2][kColumns / 8][4] = {};
    begin(stage, 0, 0, s[0]);
#pragma unroll  // in a loop the compiler would wait for sums that are under way
    for (int first = 0; first < kTileColumns; first += kColumns) {
      begin(stage, first, 1, s[1]);
      ptx::warpgroup_wait<1>(s[0]);
      use(first, 0, s[0]);
      if (first + kColumns < kTileColumns) {
        begin(stage, first + kColumns, 0, s[0]);
        ptx::warpgroup_wait<1>(s[1]);
      } else {
        ptx::warpgroup_wait<0>(s[1]);
      }
      use(first, 1, s[1]);
    }
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
  template <typename Use>
  __device__ __forceinline__ void for_products(const uint8_t* stage, int lane, Use use) const {
#pragma unroll 1
    for (int first = 0; first < kTileColumns; first += kColumns) {
      float s[2][kColumns / 8][4] = {};
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
      use(first, 0, s[0]);
      use(first, 1, s[1]);
    }
  }
};
#endif

template <int kHeadDim>
__global__ void __launch_bounds__(kProbeThreads, kHeadDim == 256 ? 1 : 2)
    probe_kernel(const __grid_constant__ Batch<ProbeParams> batch) {
  // Sizes and positions are those of all: named by the first, they are operands, not registers.
  const ProbeParams& p = batch.of[0];
  const ProbeParams& own = batch.of[blockIdx.z];
  uint8_t* const shared = ptx::dynamic_shared();
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int g = lane >> 2, i = lane & 3;
  const int kv_head = blockIdx.x, group = p.n_heads / p.n_kv_heads;
  const int block_key = blockIdx.y * kBlockKeys, first_key = block_key + warp * kWarpKeys;
  const int tile_probes = kTileColumns / group;  // a tile has whole probes

  using Product = KeyProduct<kHeadDim>;
  Product product;
#pragma unroll
  for (int n = 0; n < kWarpKeys / 8; ++n) {
    const int64_t token = min(first_key + n * 8 + g, p.n_tokens - 1);
    product.load(own.k + token * p.token_stride + static_cast<int64_t>(kv_head) * kHeadDim, n,
                 lane);
  }

  constexpr int kUnits = kHeadDim / 8;
  float2* columns = reinterpret_cast<float2*>(shared + 2 * stage_bytes(kHeadDim));
  // A thread always copies the same unit of the same query head, of whole probes at a time: looking
  // rows up took a third of all instructions.
  const int pass_probes = kProbeThreads / kUnits / group,
            n_passes = (tile_probes + pass_probes - 1) / pass_probes;
  const int own_unit = threadIdx.x % kUnits, own_row = threadIdx.x / kUnits;
  const int own_probe = own_row / group;
  const HalfBits* own_q =
      own.q + static_cast<int64_t>(kv_head * group + own_row % group) * kHeadDim + own_unit * 8;
  const auto fetch = [&](int tile, int stage) {
    const uint32_t to = ptx::shared_address(shared) + stage * stage_bytes(kHeadDim);
    int probe = own_probe, row = own_row;  // of the tile
    for (int pass = 0; pass < n_passes; ++pass, probe += pass_probes, row += pass_probes * group) {
      if (own_probe < pass_probes && probe < tile_probes) {
        const int64_t at = min(tile * tile_probes + probe, p.n_probes - 1);
        ptx::copy_16(to + Product::unit_of(row, own_unit) * 16, own_q + at * p.n_heads * kHeadDim);
      }
    }
    if (threadIdx.x < kTileColumns) {
      const int of_tile = threadIdx.x / group;
      float2 about = {INFINITY, __int_as_float(0x7fffffff)};  // a weight of zero
      if (tile * tile_probes + of_tile < p.n_probes && of_tile < tile_probes) {
        const int64_t at = tile * tile_probes + of_tile;
        about.x = __ldg(own.lse + at * p.n_heads + kv_head * group + threadIdx.x % group);
        about.y = __int_as_float(__ldg(p.positions + at));
      }
      columns[stage * kTileColumns + threadIdx.x] = about;
    }
    ptx::commit_copies();
  };
  // Columns that no probe has are zeros, so that their products are finite.
  const int n_columns = tile_probes * group, n_unused = (kTileColumns - n_columns) * kUnits;
  for (int n = threadIdx.x; n < 2 * n_unused; n += kProbeThreads) {
    uint8_t* const to = shared + n / n_unused * stage_bytes(kHeadDim);
    const int unit = Product::unit_of(n_columns + n % n_unused / kUnits, n % kUnits);
    *reinterpret_cast<uint4*>(to + unit * 16) = {0, 0, 0, 0};
  }

  const float log2_scale = p.scale * 1.44269504088896f;
  const int n_tiles = (p.n_probes + tile_probes - 1) / tile_probes;
  const int first_tile = first_seeing(p, block_key) / tile_probes;
  float sums[kWarpKeys / 8] = {};
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
    const bool masked = __float_as_int(columns[stage * kTileColumns].y) < first_key + kWarpKeys - 1;
    const auto add_weights = [&](auto is_masked, int first, int block, const auto& s) {
#pragma unroll
      for (int of = 0; of < Product::kColumns / 8; ++of) {
        const float4 about = *reinterpret_cast<const float4*>(columns + stage * kTileColumns +
                                                              first + of * 8 + i * 2);
        const float lse[2] = {about.x, about.z};
        float weights[4];  // keys g, g, g + 8, g + 8
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          weights[n] = ptx::exp2(fmaf(s[of][n], log2_scale, -lse[n % 2]));
        }
        if constexpr (is_masked) {
          const int position[2] = {__float_as_int(about.y), __float_as_int(about.w)};
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int key = first_key + block * 16 + n / 2 * 8 + g;
            weights[n] = position[n % 2] < key ? 0.0f : weights[n];
          }
        }
        sums[block * 2] += weights[0] + weights[1];
        sums[block * 2 + 1] += weights[2] + weights[3];
      }
    };
    if (masked) {
      product.for_products(rows, lane, [&](int first, int block, const auto& s) {
        add_weights(std::true_type(), first, block, s);
      });
    } else {
      product.for_products(rows, lane, [&](int first, int block, const auto& s) {
        add_weights(std::false_type(), first, block, s);
      });
    }
    __syncthreads();  // the stage is free
  }

#pragma unroll
  for (int n = 0; n < kWarpKeys / 8; ++n) {
    sums[n] += __shfl_xor_sync(ptx::kFullWarp, sums[n], 1);
    sums[n] += __shfl_xor_sync(ptx::kFullWarp, sums[n], 2);
    const int token = first_key + n * 8 + g;
    if (i == 0 && token < p.n_tokens) {
      const int n_seeing = p.n_probes - first_seeing(p, token);
      own.saliency[static_cast<int64_t>(kv_head) * p.n_tokens + token] =
          n_seeing > 0 ? sums[n] / static_cast<float>(n_seeing * group) : 0.0f;
    }
  }
}

template <int kHeadDim>
cudaError_t launch(std::span<const ProbeParams> batch, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(probe_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           probe_shared_bytes(kHeadDim));
  if (error != cudaSuccess) {
    return error;
  }
  // The first keys are seen by the most probes: the longest blocks start first.
  const dim3 grid(batch[0].n_kv_heads, (batch[0].n_tokens + kBlockKeys - 1) / kBlockKeys);
  return launch_batch(false, probe_kernel<kHeadDim>, grid, kProbeThreads,
                      probe_shared_bytes(kHeadDim), stream, batch);
}

}  // namespace

cudaError_t launch_probe(std::span<const ProbeParams> batch, cudaStream_t stream) {
  switch (batch[0].head_dim) {
    case 64:
      return launch<64>(batch, stream);
    case 128:
      return launch<128>(batch, stream);
    default:
      return launch<256>(batch, stream);
  }
}

}  // namespace zipcache::cuda
