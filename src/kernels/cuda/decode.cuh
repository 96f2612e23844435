// Decode attention over packed pages, one launch: every block of threads streams its work items,
// its warps merge in shared memory, and the last block of a row merges the row's partial results.
//
// Story of a warp:   start the ring  ->  for every item: tiles, fp16 tail, merge with the block
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/decode_row.cuh"
#include "kernels/cuda/tile_ring.cuh"

namespace zipcache::cuda {

// --- Merging states of one head ------------------------------------------------------------------

// A lane's channels of one head: kParts x kWidth neighbours, coalesced over the warp.
template <int kHeadDim>
struct HeadSlice {
  static constexpr int kWidth = kHeadDim == 64 ? 2 : 4;
  static constexpr int kParts = kHeadDim / (kWarpLanes * kWidth);
  float x[kParts][kWidth];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        x[part][c] = 0;
      }
    }
  }
  // x += weight * from[...]
  __device__ __forceinline__ void add(const float* from, float weight, int lane) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float* at = from + (part * kWarpLanes + lane) * kWidth;
      if constexpr (kWidth == 4) {
        const float4 v = *reinterpret_cast<const float4*>(at);
        x[part][0] += weight * v.x, x[part][1] += weight * v.y;
        x[part][2] += weight * v.z, x[part][3] += weight * v.w;
      } else {
        const float2 v = *reinterpret_cast<const float2*>(at);
        x[part][0] += weight * v.x, x[part][1] += weight * v.y;
      }
    }
  }
  __device__ __forceinline__ void store(float* to, float factor, int lane) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float* at = to + (part * kWarpLanes + lane) * kWidth;
      if constexpr (kWidth == 4) {
        *reinterpret_cast<float4*>(at) = {x[part][0] * factor, x[part][1] * factor,
                                          x[part][2] * factor, x[part][3] * factor};
      } else {
        *reinterpret_cast<float2*>(at) = {x[part][0] * factor, x[part][1] * factor};
      }
    }
  }
};

// The result of one head from its unnormalised sum.
template <int kHeadDim>
__device__ __forceinline__ void write_result(const DecodeParams& params, int64_t head,
                                             const HeadSlice<kHeadDim>& slice, float max, float sum,
                                             int lane) {
  slice.store(params.out + head * kHeadDim, sum > 0 ? 1.0f / sum : 0.0f, lane);
  if (lane == 0 && params.lse != nullptr) {
    params.lse[head] = sum > 0 ? max + log2f(sum) : -INFINITY;
  }
}

// The last block of a row: one warp per head reads the row's partial results.
template <int kHeadDim>
__device__ __forceinline__ void merge_partials(const DecodeParams& params, const WorkItem& item,
                                               int64_t first_head, int group, int warp, int lane) {
  const int64_t stride = partial_floats(kHeadDim, group);
  const float* partials = params.partials + item.first_partial * stride;
  for (int head = warp; head < group; head += kDecodeWarps) {
    const float* states = partials + group * kHeadDim + head * 4;
    float max = kNoScore;
    for (int n = lane; n < item.n_partials; n += kWarpLanes) {
      max = fmaxf(max, __ldcg(states + n * stride));
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      max = fmaxf(max, __shfl_xor_sync(ptx::kFullWarp, max, offset));
    }
    float sum = 0;
    HeadSlice<kHeadDim> slice;
    slice.clear();
#pragma unroll 4
    for (int n = 0; n < item.n_partials; ++n) {
      const float2 state = __ldcg(reinterpret_cast<const float2*>(states + n * stride));
      const float weight = ptx::exp2(state.x - max);
      sum += weight * state.y;
      slice.add(partials + n * stride + head * kHeadDim, weight, lane);
    }
    write_result<kHeadDim>(params, first_head + head, slice, max, sum, lane);
  }
}

// --- The kernel ----------------------------------------------------------------------------------

template <int kHeadDim>
__global__ void __launch_bounds__(kDecodeThreads, min_blocks(kHeadDim))
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ DecodeSharedPlan plan) {
  uint8_t* const shared = ptx::dynamic_shared();
  const int warp = __shfl_sync(ptx::kFullWarp, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
  const int lane = threadIdx.x % kWarpLanes;
  const int group = params.n_heads / params.n_kv_heads;

  uint8_t* control = shared + warp * kRingControlBytes;
  uint32_t* last_flag = reinterpret_cast<uint32_t*>(shared + kFlagOffset);
  float2* states = reinterpret_cast<float2*>(shared + kStateOffset);
  float* outputs = reinterpret_cast<float*>(shared + kOutputOffset);
  uint8_t* slots = shared + slots_offset(kHeadDim, group) + warp * plan.n_slots * plan.slot_bytes;

  int item_index = blockIdx.x;
  TileCursor cursor(params, item_index, warp);
  TileRing<kHeadDim> ring(control, slots, plan.n_slots, plan.slot_bytes);
  ring.start(params, cursor, warp, lane);

  QueryOperand<kHeadDim> query;
  RowState<kHeadDim> state;
  do {
    const int row = load_item(params, item_index).row;
    const int n_tiles = load_item(params, item_index).n_pages * kTilesPerPage;
    if (row < 0) {
      return;
    }
    const int sequence = row / params.n_kv_heads, kv_head = row % params.n_kv_heads;
    state.clear();
    int key_bits = 0, value_bits = 0, set = -1;

    // The warp's tiles of this item.
    int tiles_since_fold = 0;
    for (int tile = warp; tile < n_tiles; tile += kDecodeWarps) {
      const uint8_t* bytes = ring.wait();
      const TileInfo info = ring.info();
      const PageClass cls = params.classes[info.cls];
      if (info.tokens > 0) {
        if (cls.key_bits != key_bits || info.set != set) {
          key_bits = cls.key_bits;
          set = info.set;
          const int64_t global_set = __ldg(params.set_base + row) + set;
          query.load(params, sequence, kv_head, group, params.key_sets + global_set * 2 * kHeadDim,
                     key_bits, lane);
        }
        // Folding often keeps the sum of offsets (1 per weight) from drowning small codes in fp32.
        if (cls.value_bits != value_bits || ++tiles_since_fold == 64) {
          state.fold_offsets(value_bits, lane);
          value_bits = cls.value_bits;
          state.unfold(value_bits);
          tiles_since_fold = 0;
        }
        state.add_tile(bytes, key_bits, value_bits, info.tokens, query, lane);
      }
      ring.release(params, cursor, warp, lane);
    }
    state.fold_offsets(value_bits, lane);
    state.apply_factors(params.value_factors + static_cast<int64_t>(row) * kHeadDim, lane);

    // The rest of the item is read only now: it would hold registers while tiles stream.
    const WorkItem item = load_item(params, item_index);

    // The fp16 tail: at most one tile per warp.
    if (item.with_tail != 0 && params.tail_k != nullptr) {
      const int tokens = __ldg(params.tail_tokens + sequence);
      const int64_t base = static_cast<int64_t>(row) * kTailTokens * kHeadDim;
#pragma unroll 1
      for (int first = warp * kTileTokens; first < tokens; first += kDecodeWarps * kTileTokens) {
        query.load(params, sequence, kv_head, group, nullptr, kHalfBits, lane);
        state.add_tail(params.tail_k + base + first * kHeadDim,
                       params.tail_v + base + first * kHeadDim, min(tokens - first, kTileTokens),
                       query, lane);
      }
    }

    // Every warp leaves its unnormalised state.
    const int g = lane >> 2;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = state.sum[e];
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 4);
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 8);
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 16);
      const int head = (lane & 3) * 2 + e;
      if (head < group) {
        if (g == 0) {
          states[warp * kMaxGroup + head] = {state.max[e], sum};
        }
        float* to = outputs + (warp * group + head) * output_stride(kHeadDim) + g * 8;
#pragma unroll
        for (int block = 0; block < kHeadDim / 16; block += 2) {
          *reinterpret_cast<float4*>(to + block / 4 * 64 + block % 4 * 2) = {
              state.acc[block][e], state.acc[block][2 + e], state.acc[block + 1][e],
              state.acc[block + 1][2 + e]};
        }
      }
    }
    __syncthreads();

    // One warp per head merges the block.
    const int64_t first_head = static_cast<int64_t>(sequence) * params.n_heads + kv_head * group;
    for (int head = warp; head < group; head += kDecodeWarps) {
      float max = kNoScore, sum = 0;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        max = fmaxf(max, states[w * kMaxGroup + head].x);
      }
      HeadSlice<kHeadDim> slice;
      slice.clear();
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float2 part = states[w * kMaxGroup + head];
        const float weight = ptx::exp2(part.x - max);
        sum += weight * part.y;
        slice.add(outputs + (w * group + head) * output_stride(kHeadDim), weight, lane);
      }
      if (item.n_partials == 1) {
        write_result<kHeadDim>(params, first_head + head, slice, max, sum, lane);
      } else {
        float* to =
            params.partials + item.partial * static_cast<int64_t>(partial_floats(kHeadDim, group));
        slice.store(to + head * kHeadDim, 1.0f, lane);
        if (lane == 0) {
          *reinterpret_cast<float2*>(to + group * kHeadDim + head * 4) = {max, sum};
        }
      }
    }

    // The last block to finish a part of this row merges the row, and leaves the ticket at zero.
    if (item.n_partials > 1) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) {
        const uint32_t ticket = atomicAdd(params.tickets + row, 1u);
        const bool last = ticket + 1 == static_cast<uint32_t>(item.n_partials);
        if (last) {
          params.tickets[row] = 0;
        }
        *last_flag = last;
      }
      __syncthreads();
      if (*last_flag != 0) {
        __threadfence();
        merge_partials<kHeadDim>(params, item, first_head, group, warp, lane);
      }
    }
    __syncthreads();  // outputs and states are free again
    item_index = item.next;
  } while (item_index >= 0);
}

}  // namespace zipcache::cuda
