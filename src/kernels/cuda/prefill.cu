// Prefill attention: many query tokens over sealed pages and fp16 rows, with a mask.
//
// A block owns a tile of query rows (query token, head of the KV head's group), 16 per warp, and
// goes through the keys 64 at a time: a page, or 64 fp16 rows. All warps expand them to fp16 in
// shared memory (expand.cuh), then each multiplies its rows: scores, online softmax, weighted sum.
// Queries are the rows of the matrix tiles, so that the scores of a lane are the operand of the
// second product as they are. Where there are too few tiles for the device, the keys of a tile are
// cut into parts and the last block merges them.
#include <cuda_runtime.h>

#include "kernels/cuda/expand.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/prefill_config.h"

namespace zipcache::cuda {
namespace {

constexpr float kNoScore = -1e30f;  // a finite "no maximum yet": no NaN from inf - inf
constexpr float kLog2E = 1.44269504088896f;
constexpr uint32_t kMinusInfinity = 0xfc00;  // fp16
// Halves between the masks of two queries; + 8 spreads the rows of a load over the banks.
constexpr int kMaskStride = kPageTokens + 8;

// [query rows][keys][values][mask][flag, the queries' order]
struct PrefillShared {
  int keys, values, mask, flag, end;
};
__host__ __device__ constexpr PrefillShared prefill_shared(int head_dim) {
  PrefillShared at{};
  at.keys = kPrefillRows * head_dim * 2;
  at.values = at.keys + kPageTokens * head_dim * 2;
  at.mask = at.values + kPageTokens * head_dim * 2;
  at.flag = at.mask + kPrefillRows * kMaskStride * 2;
  at.end = at.flag + 16;
  return at;
}

// What a block works on.
struct Tile {
  int kv_head, group, first_query, n_queries, n_rows;
  __device__ __forceinline__ Tile(const PrefillParams& p, int index, int head)
      : kv_head(head), group(p.n_heads / p.n_kv_heads) {
    const int queries = prefill_tile_queries(group);
    first_query = index * queries;
    n_queries = min(queries, p.n_queries - first_query);
    n_rows = n_queries * group;
  }
  // Of row `row`: index into [n_queries, n_heads].
  __device__ __forceinline__ int output_row(const PrefillParams& p, int row) const {
    return (first_query + row / group) * p.n_heads + head(row);
  }
  __device__ __forceinline__ int head(int row) const { return kv_head * group + row % group; }
};

// In the order of channels that keys have: `order` (8 bytes at a time), nullptr: as they come.
template <int kHeadDim>
__device__ __forceinline__ void load_queries(const PrefillParams& p, const Tile& tile,
                                             const uint8_t* order, uint4* rows, int thread) {
  constexpr int kUnits = kHeadDim / 8;
#pragma unroll 1  // the caller's sums are in registers
  for (int n = thread; n < kPrefillRows * kUnits; n += kPrefillThreads) {
    const int row = n / kUnits, unit = n % kUnits;
    uint4 x = {0, 0, 0, 0};
    if (row < tile.n_rows) {
      const float* from = p.q + (tile.first_query + row / tile.group) * p.q_query_stride +
                          tile.head(row) * p.q_head_stride;
      float4 low, high;
      if (order == nullptr) {
        low = *reinterpret_cast<const float4*>(from + unit * 8);
        high = *reinterpret_cast<const float4*>(from + unit * 8 + 4);
      } else {
        const uint2 at = __ldg(reinterpret_cast<const uint2*>(order + unit * 8));
        low = {from[at.x & 0xff], from[at.x >> 8 & 0xff], from[at.x >> 16 & 0xff],
               from[at.x >> 24]};
        high = {from[at.y & 0xff], from[at.y >> 8 & 0xff], from[at.y >> 16 & 0xff],
                from[at.y >> 24]};
      }
      x = {ptx::pack_half2(low.x * p.scale, low.y * p.scale),
           ptx::pack_half2(low.z * p.scale, low.w * p.scale),
           ptx::pack_half2(high.x * p.scale, high.y * p.scale),
           ptx::pack_half2(high.z * p.scale, high.w * p.scale)};
    }
    rows[key_unit<kHeadDim>(row, unit)] = x;
  }
}

// The mask of 64 tokens for the tile's queries; whether any of them sees any. `cells`: of the
// tokens, nullptr: the token itself from `first_token` on.
__device__ __forceinline__ bool load_mask(const PrefillParams& p, const Tile& tile,
                                          const std::int32_t* cells, int first_token, int n_tokens,
                                          HalfBits* mask) {
  static_assert(kPrefillThreads % kPageTokens == 0);
  const int token = threadIdx.x % kPageTokens;
  int cell = -1;
  if (token < n_tokens) {
    cell = cells != nullptr ? __ldg(cells + token) : first_token + token;
  }
  bool any = false;
  for (int query = threadIdx.x / kPageTokens; query < tile.n_queries;
       query += kPrefillThreads / kPageTokens) {
    HalfBits x = kMinusInfinity;
    if (cell >= 0) {
      x = p.mask != nullptr ? __ldg(p.mask + (tile.first_query + query) * p.mask_stride + cell)
                            : HalfBits{0};
    }
    mask[query * kMaskStride + token] = x;
    any |= x != kMinusInfinity;
  }
  return any;
}

// The state of a warp's 16 rows: lane (g, i) has rows g and g + 8 and of every 8 channels 2i, 2i+1.
template <int kHeadDim>
struct Rows {
  static constexpr int kBlocks = kHeadDim / 8;
  float acc[kBlocks][4];
  float max[2], sum[2];  // sum: of this lane's tokens only
  float slope[2];        // in base 2
  int query[2];          // of the tile

  __device__ __forceinline__ Rows(const PrefillParams& p, const Tile& tile, int warp, int lane) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      acc[block][0] = acc[block][1] = acc[block][2] = acc[block][3] = 0;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = min(warp * 16 + n * 8 + (lane >> 2), tile.n_rows - 1);
      query[n] = row / tile.group;
      slope[n] = kLog2E;
      if (p.slopes != nullptr) {
        slope[n] *= __ldg(p.slopes + tile.head(row));
      }
      max[n] = kNoScore;
      sum[n] = 0;
    }
  }

  // Scores of 32 tokens to weights in place; rescales what was summed so far to the new maxima.
  // `mask`: of the first of these tokens.
  __device__ __forceinline__ void softmax(float (&s)[4][4], float softcap, const HalfBits* mask,
                                          int lane) {
    const float cap_scale = 2 * kLog2E * ptx::reciprocal(softcap);
    float largest[2] = {max[0], max[1]};
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t bias = *reinterpret_cast<const uint32_t*>(mask + query[n] * kMaskStride +
                                                                 block * 8 + (lane & 3) * 2);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[block][n * 2 + e];
          if (softcap > 0) {  // tanh(y) = 1 - 2 / (1 + e^2y)
            x = softcap - 2 * softcap * ptx::reciprocal(1 + ptx::exp2(x * cap_scale));
          }
          const float b = e == 0 ? ptx::low_half(bias) : ptx::high_half(bias);
          x = b == -INFINITY ? -INFINITY : fmaf(x, kLog2E, b * slope[n]);
          largest[n] = fmaxf(largest[n], x);
        }
      }
    }
    if (__any_sync(ptx::kFullWarp, largest[0] > max[0] || largest[1] > max[1])) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        largest[n] = fmaxf(largest[n], __shfl_xor_sync(ptx::kFullWarp, largest[n], 1));
        largest[n] = fmaxf(largest[n], __shfl_xor_sync(ptx::kFullWarp, largest[n], 2));
        const float factor = ptx::exp2(max[n] - largest[n]);
        max[n] = largest[n];
        sum[n] *= factor;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          acc[block][n * 2] *= factor;
          acc[block][n * 2 + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[block][e] = ptx::exp2(s[block][e] - max[e / 2]);
        sum[e / 2] += s[block][e];
      }
    }
  }

  // 64 tokens. `first_row`: the warp's first in `rows`.
  __device__ __forceinline__ void add(const uint4* rows, const uint4* keys, const uint4* values,
                                      const HalfBits* mask, float softcap, int first_row,
                                      int lane) {
    const int g = lane >> 2, i = lane & 3;
#pragma unroll 1  // 64 scores at once would spill
    for (int tile = 0; tile < kTilesPerPage; ++tile) {
      float s[4][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kHeadDim / 32; ++chunk) {
        const uint4 upper =
            ptx::load_shared_16(rows + key_unit<kHeadDim>(first_row + g, chunk * 4 + i));
        const uint4 lower =
            ptx::load_shared_16(rows + key_unit<kHeadDim>(first_row + 8 + g, chunk * 4 + i));
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          const uint4 k = ptx::load_shared_16(
              keys + key_unit<kHeadDim>(tile * kTileTokens + block * 8 + g, chunk * 4 + i));
          ptx::mma_16x8x16(s[block], {upper.x, lower.x, upper.y, lower.y}, k.x, k.y);
          ptx::mma_16x8x16(s[block], {upper.z, lower.z, upper.w, lower.w}, k.z, k.w);
        }
      }
      softmax(s, softcap, mask + tile * kTileTokens, lane);
      uint32_t p[2][4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        p[n / 2][n % 2 * 2] = ptx::pack_half2(s[n][0], s[n][1]);
        p[n / 2][n % 2 * 2 + 1] = ptx::pack_half2(s[n][2], s[n][3]);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const uint4 v = ptx::load_shared_16(values + value_unit(block * 8 + g, tile * 4 + i));
        ptx::mma_16x8x16(acc[block], p[0], v.x, v.y);
        ptx::mma_16x8x16(acc[block], p[1], v.z, v.w);
      }
    }
  }

  __device__ __forceinline__ void apply_factors(const float* factors, int lane) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const float2 f = __ldg(reinterpret_cast<const float2*>(factors + block * 8 + (lane & 3) * 2));
      acc[block][0] *= f.x, acc[block][1] *= f.y;
      acc[block][2] *= f.x, acc[block][3] *= f.y;
    }
  }
};

// Adds the row's sink to (max, sum): the factor of what was summed, and the row's lse.
__device__ __forceinline__ float finish_row(const PrefillParams& p, int row, int head, float max,
                                            float sum, bool write_lse) {
  float factor = 1;
  if (p.sinks != nullptr) {
    const float sink = __ldg(p.sinks + head) * kLog2E;
    const float largest = fmaxf(max, sink);
    factor = ptx::exp2(max - largest);
    sum = sum * factor + ptx::exp2(sink - largest);
    max = largest;
  }
  if (write_lse && p.lse != nullptr) {
    p.lse[row] = sum > 0 ? max + log2f(sum) : -INFINITY;
  }
  return sum > 0 ? factor / sum : 0.0f;
}

// The last block of a tile merges its parts: a warp per row, a row's channels over the lanes.
template <int kHeadDim>
__device__ __forceinline__ void merge_parts(const PrefillParams& p, const Tile& tile,
                                            const float* parts, int64_t stride, int warp,
                                            int lane) {
  constexpr int kOwn = kHeadDim / kWarpLanes;
  const float* states = parts + prefill_tile_rows(p) * kHeadDim;
  for (int row = warp; row < tile.n_rows; row += kPrefillWarps) {
    float max = kNoScore;
    for (int part = lane; part < p.n_splits; part += kWarpLanes) {
      max = fmaxf(max, __ldcg(states + part * stride + row * 2));
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      max = fmaxf(max, __shfl_xor_sync(ptx::kFullWarp, max, offset));
    }
    float sum = 0, acc[kOwn] = {};
    for (int part = 0; part < p.n_splits; ++part) {
      const float2 state =
          __ldcg(reinterpret_cast<const float2*>(states + part * stride + row * 2));
      const float weight = ptx::exp2(state.x - max);
      sum += weight * state.y;
#pragma unroll
      for (int n = 0; n < kOwn; ++n) {
        acc[n] += weight * __ldcg(parts + part * stride + row * kHeadDim + n * kWarpLanes + lane);
      }
    }
    const int to = tile.output_row(p, row);
    const float factor = finish_row(p, to, tile.head(row), max, sum, lane == 0);
#pragma unroll
    for (int n = 0; n < kOwn; ++n) {
      p.out[int64_t{to} * kHeadDim + n * kWarpLanes + lane] = acc[n] * factor;
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kPrefillThreads, prefill_blocks_per_sm(kHeadDim))
    prefill_kernel(const __grid_constant__ PrefillParams p) {
  constexpr PrefillShared at = prefill_shared(kHeadDim);
  uint8_t* const shared = ptx::dynamic_shared();
  uint4* const rows = reinterpret_cast<uint4*>(shared);
  uint4* const keys = reinterpret_cast<uint4*>(shared + at.keys);
  uint4* const values = reinterpret_cast<uint4*>(shared + at.values);
  HalfBits* const mask = reinterpret_cast<HalfBits*>(shared + at.mask);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int split = blockIdx.x % p.n_splits;
  const Tile tile(p, blockIdx.x / p.n_splits, blockIdx.y);

  Rows<kHeadDim> state(p, tile, warp, lane);
  const bool has_rows = warp * 16 < tile.n_rows;

  const int first_page = p.row_begin != nullptr ? __ldg(p.row_begin + tile.kv_head) : 0;
  const int n_pages =
      p.row_begin != nullptr ? __ldg(p.row_begin + tile.kv_head + 1) - first_page : 0;
  const int n_units = n_pages + (p.n_dense + kPageTokens - 1) / kPageTokens;
  const int begin = static_cast<int>(static_cast<int64_t>(n_units) * split / p.n_splits);
  const int end = static_cast<int>(static_cast<int64_t>(n_units) * (split + 1) / p.n_splits);
  const float* factors = p.value_factors + tile.kv_head * kHeadDim;
  // The scale set whose order the queries have. In shared memory: no register is left for it.
  constexpr int kNoQueries = -2, kAsTheyCome = -1;
  int* const queries_for = reinterpret_cast<int*>(shared + at.flag) + 1;
  if (threadIdx.x == 0) {
    *queries_for = kNoQueries;
  }
  for (int unit = begin; unit < end; ++unit) {
    const int own = ptx::opaque(lane);
    const bool is_page = unit < n_pages;
    if (!is_page && unit == n_pages && unit > begin) {
      state.apply_factors(factors, lane);
    }
    __syncthreads();  // the tokens before are no longer in use
    PageEntry entry;
    int n_tokens = 0;
    const int first_token = (unit - n_pages) * kPageTokens;
    bool any = false;
    if (is_page) {
      entry = p.pages[first_page + unit];
      n_tokens = entry.tokens;
      any = load_mask(p, tile, p.page_cells + int64_t{first_page + unit} * kPageTokens, 0, n_tokens,
                      mask);
    } else {
      n_tokens = min(p.n_dense - first_token, kPageTokens);
      any = load_mask(p, tile, p.dense_cells != nullptr ? p.dense_cells + first_token : nullptr,
                      first_token, n_tokens, mask);
    }
    if (__syncthreads_or(any) == 0) {
      continue;
    }
    const int64_t set = is_page ? __ldg(p.set_base + tile.kv_head) + entry.set : 0;
    const bool has_order = is_page && p.classes[entry.cls].wide_chunks > 0;
    const int wanted = has_order ? static_cast<int>(set) : kAsTheyCome;
    if (*queries_for != wanted) {
      load_queries<kHeadDim>(p, tile, has_order ? p.key_orders + set * kHeadDim : nullptr, rows,
                             ptx::opaque(threadIdx.x));
    }
    if (is_page) {
      expand_page<kHeadDim>(p.pool + static_cast<uint64_t>(entry.unit) * kTileAlignment,
                            p.classes[entry.cls], p.key_sets + set * 2 * kHeadDim, keys, values,
                            warp, kPrefillWarps, own);
    } else {
      const int64_t base = first_token * p.dense_token_stride + tile.kv_head * p.dense_head_stride;
      expand_rows<kHeadDim>(p.dense_k + base, p.dense_v + base, p.dense_token_stride, n_tokens,
                            keys, values, warp, kPrefillWarps, own);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      *queries_for = wanted;
    }
    if (has_rows) {
      state.add(rows, keys, values, mask, p.softcap, warp * 16, kHeadDim == 256 ? own : lane);
    }
  }
  if (begin < end && end <= n_pages) {
    state.apply_factors(factors, lane);
  }

  // The rows' results, or one of their parts.
  const int tile_index = (blockIdx.x / p.n_splits) * p.n_kv_heads + tile.kv_head;
  const int64_t stride = static_cast<int64_t>(prefill_tile_rows(p)) * (kHeadDim + 2);
  float* const parts = p.partials + tile_index * p.n_splits * stride;
  if (has_rows) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = warp * 16 + n * 8 + (lane >> 2);
      float sum = state.sum[n];
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 1);
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 2);
      if (row < tile.n_rows) {
        float* to = parts + split * stride + row * kHeadDim;
        float factor = 1;
        if (p.n_splits == 1) {
          const int out = tile.output_row(p, row);
          to = p.out + int64_t{out} * kHeadDim;
          factor = finish_row(p, out, tile.head(row), state.max[n], sum, (lane & 3) == 0);
        } else if ((lane & 3) == 0) {
          *reinterpret_cast<float2*>(parts + split * stride + prefill_tile_rows(p) * kHeadDim +
                                     row * 2) = {state.max[n], sum};
        }
#pragma unroll
        for (int block = 0; block < kHeadDim / 8; ++block) {
          *reinterpret_cast<float2*>(to + block * 8 + (lane & 3) * 2) = {
              state.acc[block][n * 2] * factor, state.acc[block][n * 2 + 1] * factor};
        }
      }
    }
  }
  if (p.n_splits == 1) {
    return;
  }
  int* const is_last = reinterpret_cast<int*>(shared + at.flag);
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = ptx::take_ticket(p.tickets + tile_index) + 1 == static_cast<uint32_t>(p.n_splits);
    if (*is_last != 0) {
      p.tickets[tile_index] = 0;
    }
  }
  __syncthreads();
  if (*is_last != 0) {
    merge_parts<kHeadDim>(p, tile, parts, stride, warp, lane);
  }
}

template <typename Call>
cudaError_t with_kernel(int head_dim, Call call) {
  switch (head_dim) {
    case 64:
      return call(prefill_kernel<64>);
    case 128:
      return call(prefill_kernel<128>);
    default:
      return call(prefill_kernel<256>);
  }
}

}  // namespace

cudaError_t prepare_prefill(int head_dim, int* blocks_per_sm) {
  const int bytes = prefill_shared(head_dim).end;
  return with_kernel(head_dim, [&](auto kernel) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return error != cudaSuccess ? error
                                : cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                                      blocks_per_sm, kernel, kPrefillThreads, bytes);
  });
}

cudaError_t launch_prefill(const PrefillParams& p, cudaStream_t stream) {
  const dim3 grid(prefill_tiles(p) * p.n_splits, p.n_kv_heads);
  return with_kernel(p.head_dim, [&](auto kernel) {
    return launch_kernel(kernel, grid, kPrefillThreads, prefill_shared(p.head_dim).end, stream, p);
  });
}

}  // namespace zipcache::cuda
