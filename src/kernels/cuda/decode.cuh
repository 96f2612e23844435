// Decode attention over packed pages, one launch: every block of threads streams its work items,
// its warps merge in shared memory, and the last block of a row merges the row's partial results.
//
// Story of a block:   start the rings  ->  for every item: fold the query, tiles, and where a part
// of a row ends: fp16 tail, merge of the warps, merge of the row by the last
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/decode_merge.cuh"
#include "kernels/cuda/decode_row.cuh"
#include "kernels/cuda/tile_ring.cuh"

namespace zipcache::cuda {

struct ItemHead {
  int n_pages, next, tile_bytes, row, n_tokens, value_offset, first_set;
  uint32_t bits, page_folds;
};
__device__ __forceinline__ ItemHead load_item(const DecodeParams& params, int index) {
  const uint4* item = reinterpret_cast<const uint4*>(params.items + index);
  const uint4 a = ptx::load_16(item), b = ptx::load_16(item + 1), c = ptx::load_16(item + 2);
  ItemHead head;
  head.n_pages = static_cast<int>(a.y);
  head.next = static_cast<int>(a.z);
  head.tile_bytes = static_cast<int>(a.w);
  head.row = static_cast<int>(b.x);
  head.bits = b.y;
  head.n_tokens = static_cast<int>(b.z);
  head.value_offset = static_cast<int>(b.w);
  head.page_folds = c.x;
  head.first_set = static_cast<int>(c.y);
  return head;
}

// --- The step's own token ------------------------------------------------------------------------

// What DecodeStore says of a row, as token `at` of its tail. All threads call this; what it wrote
// is there for them after a barrier.
template <int kHeadDim>
__device__ __forceinline__ void store_token(const DecodeParams& params, int group, int sequence,
                                            int row, int at) {
  const DecodeStore& store = params.store;
  const int head = row - sequence * params.n_kv_heads;
  const auto to_half = [](float x) { return static_cast<HalfBits>(ptx::pack_half2(x, 0)); };
  const float* k = store.k + sequence * store.k_stride + head * kHeadDim;
  const float* v = store.v + sequence * store.v_stride + head * kHeadDim;
  const int64_t to = tail_offset(row, kHeadDim) + at * kHeadDim;
#pragma unroll 1
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
#pragma unroll 1
    for (int n = threadIdx.x; n < group * kHeadDim; n += decode_threads(kHeadDim)) {
      store.ring_q[first * kHeadDim + n] =
          to_half(__ldg(params.q + static_cast<int64_t>(row) * group * kHeadDim + n));
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
      params, plan, shared, shared + at.query_scalars,
      reinterpret_cast<float*>(shared + at.outputs) + warp * group * output_stride(kHeadDim), lane);
  int index = first_item;
  ItemHead item = load_item(params, index);
  const auto folds_of_item = [&] {
    return FoldJob{params.q + static_cast<int64_t>(item.row) * group * kHeadDim,
                   params.items + index, item_folds(item.bits), item.first_set};
  };
  // The first fold stands before the loop: no registers of a row are taken yet.
  const auto first_fold = query.begin_folds(folds_of_item(), warp, lane);
  ring.fill_up(params, lane);
  query.end_folds(folds_of_item(), first_fold, warp, lane);
  item.bits &= ~kItemFolds;
  RowState<kHeadDim, kLaneHeads> state;
  state.clear();
  int value_bits = 0;
  for (;;) {
    const PageClass cls = item_class(item.bits);
    const TileShape shape(cls, item.value_offset, item.tile_bytes);
    const float* factors = params.value_factors + static_cast<int64_t>(item.row) * kHeadDim;
    if ((item.bits & kItemEndsPart) != 0 && warp == 0 && lane < kHeadDim / 32) {
      ptx::prefetch(factors + lane * 32);
    }
    if ((item.bits & kItemFolds) != 0) {
      query.end_folds(folds_of_item(), query.begin_folds(folds_of_item(), warp, lane), warp, lane);
    }
    const int n_tiles = item.n_pages * kTilesPerPage;
    int tile = first_tile_of_warp(kHeadDim, item.bits, warp);
    // Also without a tile: asked for by some warps only, it costs groups of 8 registers (61.7 to
    // 65.9 us at 8 x 32k).
    query.take(warp_fold(item.page_folds, tile), lane);
    if (tile < n_tiles && cls.value_bits != value_bits) {
      state.change_width(value_bits, cls.value_bits, lane);
      value_bits = cls.value_bits;
    }
    for (; tile < n_tiles; tile += kWarps) {
      const int tokens = min(item.n_tokens - tile * kTileTokens, kTileTokens);
      const uint8_t* bytes = ring.wait();
      if (tokens > 0) {
        state.add_tile(bytes, shape, tokens, query, lane);
      }
      ring.release(params, lane);
    }

    if ((item.bits & kItemEndsPart) != 0) {
      state.change_width(value_bits, 0, lane);
      state.apply_factors(factors, lane);
      if ((item.bits & kItemWithTail) != 0 && params.tail_k != nullptr) {
        const int sequence = __ldg(&params.items[index].sequence);
        const int tokens = __ldg(params.tail_tokens + sequence);
        const int64_t base = tail_offset(item.row, kHeadDim);
        if (params.store.k != nullptr) {
          store_token<kHeadDim>(params, group, sequence, item.row, tokens - 1);
          __syncthreads();
        }
        query.take(item.bits >> kItemTailFoldShift & kFoldMask, lane);
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
    // Read again for groups above 4: a register less in the loop (8 x 32k, groups of 8: 63.4
    // to 61.3 us; 8 x 8k, groups of 4: 27.1 to 27.7).
    index = kLaneHeads == 1 ? item.next : __ldg(&params.items[index].next);
    if (index < 0) {
      break;
    }
    item = load_item(params, index);
  }
}

}  // namespace zipcache::cuda
