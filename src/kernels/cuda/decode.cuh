// Decode attention over packed pages, one launch: every block of threads streams its work items,
// its warps merge in shared memory, and the last block of a row merges the row's partial results.
//
// Story of a block:   start the rings  ->  for every item: fold the query, tiles, and where a part
// of a row ends: fp16 tail, merge of the warps, merge of the row by the last
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/decode_row.cuh"
#include "kernels/cuda/tile_ring.cuh"

namespace zipcache::cuda {

struct ItemHead {
  int n_pages, next, tile_bytes, row, n_tokens, value_offset, fold, n_folds, first_set;
  uint32_t bits;
};
__device__ __forceinline__ ItemHead load_item(const DecodeParams& params, int index) {
  const uint4* item = reinterpret_cast<const uint4*>(params.items + index);
  const uint4 a = ptx::load_16(item), b = ptx::load_16(item + 1), c = ptx::load_16(item + 2);
  ItemHead head;
  head.n_pages = static_cast<int>(a.y);
  head.next = static_cast<int>(a.z);
  head.tile_bytes = static_cast<int>(a.w);
  head.row = static_cast<int>(b.x);
  head.bits = b.z;
  head.n_tokens = static_cast<int>(b.w);
  head.value_offset = static_cast<int>(c.x);
  head.fold = static_cast<int>(c.y);
  head.n_folds = static_cast<int>(c.z);
  head.first_set = static_cast<int>(c.w);
  return head;
}

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
  __device__ __forceinline__ void load(const float* from, int lane) {
    load_with([](const auto* at) { return *at; }, from, lane);
  }
  // The same of what another block has written.
  __device__ __forceinline__ void load_global(const float* from, int lane) {
    load_with([](const auto* at) { return __ldcg(at); }, from, lane);
  }
  __device__ __forceinline__ void add(const HeadSlice& other, float weight) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        x[part][c] += weight * other.x[part][c];
      }
    }
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        x[part][c] *= factor;
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

 private:
  template <typename Load>
  __device__ __forceinline__ void load_with(Load load, const float* from, int lane) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float* at = from + (part * kWarpLanes + lane) * kWidth;
      if constexpr (kWidth == 4) {
        const float4 v = load(reinterpret_cast<const float4*>(at));
        x[part][0] = v.x, x[part][1] = v.y, x[part][2] = v.z, x[part][3] = v.w;
      } else {
        const float2 v = load(reinterpret_cast<const float2*>(at));
        x[part][0] = v.x, x[part][1] = v.y;
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

// Merges unnormalised results of a head: a running maximum, sum and output.
template <int kHeadDim>
struct HeadMerge {
  float max = kNoScore, sum = 0;  // sum: of this lane's results only, until finish()
  HeadSlice<kHeadDim> slice;

  __device__ __forceinline__ HeadMerge() { slice.clear(); }
  // `count` <= 32 results, lane n holding (max, sum) of result n; `load(n, slice)` gets its output.
  // kBatch of them are asked for at once, the first before the states are there.
  template <int kBatch, typename Load>
  __device__ __forceinline__ void merge(float2 state, int count, int lane, Load load) {
    HeadSlice<kHeadDim> of[kBatch];
    const auto load_batch = [&](int first) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        of[n].clear();
        if (first + n < count) {
          load(first + n, of[n]);
        }
      }
    };
    load_batch(0);
    float largest = lane < count ? state.x : kNoScore;
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(ptx::kFullWarp, largest, offset));
    }
    largest = fmaxf(largest, max);
    const float rescale = ptx::exp2(max - largest);
    const float weight = lane < count ? ptx::exp2(state.x - largest) : 0.0f;
    sum = sum * rescale + (lane < count ? weight * state.y : 0.0f);
    max = largest;
    slice.scale(rescale);
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        slice.add(of[n], __shfl_sync(ptx::kFullWarp, weight, (first + n) % kWarpLanes));
      }
      first += kBatch;
      if (first >= count) {
        break;
      }
      load_batch(first);
    }
  }
  __device__ __forceinline__ void finish() {
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, offset);
    }
  }
};

// The last block of a row merges the row's partial results. Each head has one or more warps; each
// takes a run of the results.
template <int kHeadDim>
__device__ __forceinline__ void merge_partials(const DecodeParams& params, int first_partial,
                                               int n_partials, int64_t first_head, int group,
                                               float* outputs, float2* states, int warp, int lane) {
  constexpr int kWarps = decode_warps(kHeadDim);
  // A row of all blocks of a large device has 33 results, of which a warp takes 17: two trips to
  // memory. All 17 at once spill.
  constexpr int kPartialBatch = 9 * 4 / (kHeadDim / kWarpLanes);
  const int64_t stride = partial_floats(kHeadDim, group);
  const float* partials = params.partials + first_partial * stride;
  const int per_head = max(kWarps / group, 1);
  const int part = warp % per_head;
  const int begin = n_partials * part / per_head, end = n_partials * (part + 1) / per_head;
  for (int head = warp / per_head; head < group; head += kWarps / per_head) {
    HeadMerge<kHeadDim> merged;
    for (int first = begin; first < end; first += kWarpLanes) {
      const int count = min(end - first, kWarpLanes);
      const float* at = partials + first * stride;
      float2 state = {0, 0};
      if (lane < count) {
        state = __ldcg(
            reinterpret_cast<const float2*>(at + lane * stride + group * kHeadDim + head * 4));
      }
      merged.template merge<kPartialBatch>(
          state, count, lane, [&](int n, HeadSlice<kHeadDim>& slice) {
            slice.load_global(at + n * stride + head * kHeadDim, lane);
          });
    }
    merged.finish();
    if (per_head == 1) {
      write_result<kHeadDim>(params, first_head + head, merged.slice, merged.max, merged.sum, lane);
    } else {
      merged.slice.store(outputs + warp * output_stride(kHeadDim), 1.0f, lane);
      if (lane == 0) {
        states[warp] = {merged.max, merged.sum};
      }
    }
  }
  if (per_head == 1) {
    return;
  }
  __syncthreads();
  const int head = warp / per_head;
  if (part == 0 && head < group) {
    HeadMerge<kHeadDim> merged;
    merged.template merge<kWarps>(lane < per_head ? states[warp + lane] : float2{0, 0}, per_head,
                                  lane, [&](int n, HeadSlice<kHeadDim>& slice) {
                                    slice.load(outputs + (warp + n) * output_stride(kHeadDim),
                                               lane);
                                  });
    merged.finish();
    write_result<kHeadDim>(params, first_head + head, merged.slice, merged.max, merged.sum, lane);
  }
}

// --- The end of a block's part of a row ----------------------------------------------------------

// The warps' unnormalised states become the row's result, or one of its partial results. All
// threads call this; shared memory is free again when it returns.
template <int kHeadDim, int kLaneHeads>
__device__ __forceinline__ void finish_part(const DecodeParams& params, int group, int item,
                                            int row, const RowState<kHeadDim, kLaneHeads>& state,
                                            uint8_t* shared, int warp, int lane) {
  constexpr int kWarps = decode_warps(kHeadDim);
  const DecodeShared at = decode_shared(kHeadDim, group);
  float2* states = reinterpret_cast<float2*>(shared + at.states);
  float* outputs = reinterpret_cast<float*>(shared + at.outputs);
  uint32_t* last_flag = reinterpret_cast<uint32_t*>(shared + at.control);
  const int first_partial = __ldg(&params.items[item].first_partial);
  const int n_partials = __ldg(&params.items[item].n_partials);
  const int partial = __ldg(&params.items[item].partial);

  const int g = lane >> 2;
#pragma unroll
  for (int e = 0; e < kLaneHeads; ++e) {
    float sum = state.sum[e];
    sum += __shfl_xor_sync(ptx::kFullWarp, sum, 4);
    sum += __shfl_xor_sync(ptx::kFullWarp, sum, 8);
    sum += __shfl_xor_sync(ptx::kFullWarp, sum, 16);
    const int head = (lane & 3) * kLaneHeads + e;
    if (head < group) {
      if (g == 0) {
        states[head * kWarps + warp] = {state.max[e], sum};
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
  const int64_t first_head = static_cast<int64_t>(row) * group;
  for (int head = warp; head < group; head += kWarps) {
    HeadMerge<kHeadDim> merged;
    merged.template merge<kWarps>(
        lane < kWarps ? states[head * kWarps + lane] : float2{0, 0}, kWarps, lane,
        [&](int n, HeadSlice<kHeadDim>& slice) {
          slice.load(outputs + (n * group + head) * output_stride(kHeadDim), lane);
        });
    merged.finish();
    if (n_partials == 1) {
      write_result<kHeadDim>(params, first_head + head, merged.slice, merged.max, merged.sum, lane);
    } else {
      float* to = params.partials + partial * static_cast<int64_t>(partial_floats(kHeadDim, group));
      merged.slice.store(to + head * kHeadDim, 1.0f, lane);
      if (lane == 0) {
        *reinterpret_cast<float2*>(to + group * kHeadDim + head * 4) = {merged.max, merged.sum};
      }
    }
  }
  __syncthreads();
  if (n_partials == 1) {
    return;
  }

  // The last block to finish a part of this row merges the row, and leaves the ticket at zero.
  if (threadIdx.x == 0) {
    const bool last =
        ptx::take_ticket(params.tickets + row) + 1 == static_cast<uint32_t>(n_partials);
    if (last) {
      params.tickets[row] = 0;
    }
    *last_flag = last;
  }
  __syncthreads();
  if (*last_flag != 0) {
    merge_partials<kHeadDim>(params, first_partial, n_partials, first_head, group, outputs, states,
                             warp, lane);
  }
  __syncthreads();
}

// --- The step's own token ------------------------------------------------------------------------

// What DecodeStore says of a row, as token `at` of its tail. All threads call this; what it wrote
// is there for them after a barrier.
template <int kHeadDim>
__device__ __forceinline__ void store_token(const DecodeParams& params, int group, int row, int at,
                                            const float* q) {
  const DecodeStore& store = params.store;
  const int sequence = row / params.n_kv_heads, head = row % params.n_kv_heads;
  const auto to_half = [](float x) { return static_cast<HalfBits>(ptx::pack_half2(x, 0)); };
  const float* k = store.k + sequence * store.k_stride + head * kHeadDim;
  const float* v = store.v + sequence * store.v_stride + head * kHeadDim;
  const int64_t to = (static_cast<int64_t>(row) * kTailTokens + at) * kHeadDim;
  for (int n = threadIdx.x; n < kHeadDim; n += decode_threads(kHeadDim)) {
    params.tail_k[to + n] = to_half(__ldg(k + n));
    params.tail_v[to + n] = to_half(__ldg(v + n));
  }
  if (store.ring_q == nullptr) {
    return;
  }
  const int slot = __ldg(store.ring_at + 2 * sequence);
  const int lse_slot = __ldg(store.ring_at + 2 * sequence + 1);
  if (slot >= 0) {
    const int64_t first =
        (static_cast<int64_t>(sequence) * store.ring + slot) * params.n_heads + head * group;
    for (int n = threadIdx.x; n < group * kHeadDim; n += decode_threads(kHeadDim)) {
      store.ring_q[first * kHeadDim + n] = to_half(__ldg(q + n));
    }
  }
  if (lse_slot >= 0 &&
      static_cast<int>(threadIdx.x) < group) {  // this launch's lse comes when all parts have ended
    const int at_head = head * group + threadIdx.x;
    store.ring_lse[(static_cast<int64_t>(sequence) * store.ring + lse_slot) * params.n_heads +
                   at_head] = params.lse[static_cast<int64_t>(sequence) * params.n_heads + at_head];
  }
}

// --- The kernel ----------------------------------------------------------------------------------

template <int kHeadDim, int kLaneHeads>
__global__ void __launch_bounds__(decode_threads(kHeadDim), kDecodeBlocksPerSm)
    decode_kernel(const __grid_constant__ DecodeParams params,
                  const __grid_constant__ DecodeSharedPlan plan) {
  constexpr int kWarps = decode_warps(kHeadDim);
  uint8_t* const shared = ptx::dynamic_shared();
  const int warp = __shfl_sync(ptx::kFullWarp, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
  const int lane = threadIdx.x % kWarpLanes;
  const int group = plan.group;
  const DecodeShared at = decode_shared(kHeadDim, group);
  const int first_item = static_cast<int>(blockIdx.x) * kItemGroup;

  ptx::let_next_launch_start();
  TileRing<kHeadDim> ring(params, shared + at.control + kFlagBytes + warp * kRingControlBytes,
                          reinterpret_cast<WorkItem*>(shared + at.items) + warp * kItemGroup,
                          shared + at.slots + warp * plan.ring_bytes, plan, first_item, warp, lane);
  ptx::wait_for_launch_before();
  QueryOperand<kHeadDim, kLaneHeads> query(
      params, group, shared, shared + at.query_scalars,
      reinterpret_cast<float*>(shared + at.outputs) + warp * group * output_stride(kHeadDim), lane);
  int index = first_item;
  ItemHead item = load_item(params, index);
  const auto query_of_row = [&] {
    return params.q + static_cast<int64_t>(item.row) * group * kHeadDim;
  };
  const auto fold_sets = [&](const float* q, auto meanwhile) {
    query.fold_sets(q, params.items + index, item.n_folds, item.first_set, warp, lane, meanwhile);
  };
  // The first fold stands before the loop: no registers of a row are taken yet.
  if ((item.bits & kItemFolds) != 0) {
    fold_sets(query_of_row(), [&] { ring.fill_up(params, lane); });
  } else {
    ring.fill_up(params, lane);
  }
  RowState<kHeadDim, kLaneHeads> state;
  state.clear();
  int value_bits = 0;
  WarpTurn<kWarps> turn;
  for (;;) {
    const PageClass cls = item_class(item.bits);
    const TileShape shape(cls, item.value_offset, item.tile_bytes);
    const float* q = query_of_row();
    const float* factors = params.value_factors + static_cast<int64_t>(item.row) * kHeadDim;
    if ((item.bits & kItemEndsPart) != 0 && warp == 0 && lane < kHeadDim / 32) {
      ptx::prefetch(factors + lane * 32);
    }
    if (item.n_pages > 0) {
      // first_item by another name: kept in a register over the loop it would spill.
      if ((item.bits & kItemFolds) != 0 && index != static_cast<int>(blockIdx.x) * kItemGroup) {
        fold_sets(q, [] {});
      }
      query.take(item.fold, lane);
      if (cls.value_bits != value_bits) {
        state.change_width(value_bits, cls.value_bits, lane);
        value_bits = cls.value_bits;
      }
    }
    const int n_tiles = item.n_pages * kTilesPerPage;
    for (int tile = turn.first(warp); tile < n_tiles; tile += kWarps) {
      const int tokens = min(item.n_tokens - tile * kTileTokens, kTileTokens);
      const uint8_t* bytes = ring.wait();
      if (tokens > 0) {
        state.add_tile(bytes, shape, tokens, query, lane);
      }
      ring.release(params, lane);
    }
    turn.pass(n_tiles);

    if ((item.bits & kItemEndsPart) != 0) {
      state.change_width(value_bits, 0, lane);
      state.apply_factors(factors, lane);
      if ((item.bits & kItemWithTail) != 0 && params.tail_k != nullptr) {
        const int tokens = __ldg(params.tail_tokens + item.row / params.n_kv_heads);
        const int64_t base = static_cast<int64_t>(item.row) * kTailTokens * kHeadDim;
        if (params.store.k != nullptr) {
          store_token<kHeadDim>(params, group, item.row, tokens - 1, q);
        }
        query.fold_tail(q, warp, lane);
        // Half a tile per warp: its loads follow each other, so more warps wait for fewer.
        constexpr int kShare = kTileTokens / 2;
#pragma unroll 1
        for (int first = warp * kShare; first < tokens; first += kWarps * kShare) {
          state.add_tail(params.tail_k + base + first * kHeadDim,
                         params.tail_v + base + first * kHeadDim, min(tokens - first, kShare),
                         query, lane);
        }
      }
      finish_part<kHeadDim>(params, group, index, item.row, state, shared, warp, lane);
      state.clear();
      value_bits = 0;
    }
    index = item.next;
    if (index < 0) {
      break;
    }
    item = load_item(params, index);
  }
}

}  // namespace zipcache::cuda
