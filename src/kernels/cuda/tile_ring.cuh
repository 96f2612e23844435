// How packed tiles reach a warp: each warp owns a ring of slots in shared memory and fills it
// itself, as many tiles ahead as there are slots, across the block's work items. No warp waits for
// another while it streams.
//
// On sm_90 a tile is one bulk copy issued by one lane; before that it is 16-byte asynchronous
// copies by all lanes. Both arrive at the slot's barrier.
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {

template <int kHeadDim>
class TileRing {
 public:
  static constexpr int kWarps = decode_warps(kHeadDim);

  // `control` (kRingControlBytes), `group` and `slots` are this warp's own.
  __device__ __forceinline__ TileRing(const DecodeParams& params, uint8_t* control, WorkItem* group,
                                      uint8_t* slots, const DecodeSharedPlan& plan, int first_item,
                                      int warp, int lane)
      : plan_(plan),
        slots_(slots),
        barrier_(ptx::shared_address(control)),
        next_item_(first_item),
        warp_(warp),
        group_(group) {
    if (lane == 0) {
      for (int slot = 0; slot < plan.n_slots; ++slot) {
#if __CUDA_ARCH__ >= 900
        ptx::barrier_init(barrier_ + slot * kBarrierBytes, 1);
#else
        ptx::barrier_init(barrier_ + slot * kBarrierBytes, kWarpLanes);
#endif
      }
#if __CUDA_ARCH__ >= 900
      ptx::fence_barrier_init();
#endif
    }
    __syncwarp();
    load_group(params, lane);
    open_items(params, lane);
    if (next_ < known_) {
      copy_tile(params, lane);
      advance();
    }
    prefetch_group(params, lane);  // of later groups too: 8 x 8k took 27.0 us instead of 26.2
  }

  // Fills the other slots, once, before the first wait(). Until then few bytes are on their way,
  // and what the block waits for first does not queue behind them: with all slots filled at once 8
  // x 8k in blocks of 512 took 28.4 us instead of 27.0, 1 x 32k 15.0 instead of 14.6.
  __device__ __forceinline__ void fill_up(const DecodeParams& params, int lane) {
    if (next_ == 0 || slot_ != 0) {
      do {
        fill(params, lane);
        advance();
      } while (slot_ != 0);
    }
  }

  // The tile at hand; blocks until its bytes are there.
  __device__ __forceinline__ const uint8_t* wait() const {
    ptx::barrier_wait(barrier_, parity_);
    return slots_ + slot_;
  }

  // Gives the slot at hand to the next tile and moves on.
  __device__ __forceinline__ void release(const DecodeParams& params, int lane) {
    __syncwarp();  // every lane has read the slot
    fill(params, lane);
    if (advance()) {
      parity_ ^= 1;
    }
  }

 private:
  static_assert(kWarps % kTilesPerPage == 0);
  static constexpr int kBarrierBytes = kRingControlBytes / kMaxRingSlots;

  // To the next slot; true: it is the first again.
  __device__ __forceinline__ bool advance() {
    slot_ += plan_.slot_bytes;
    barrier_ += kBarrierBytes;
    if (slot_ < plan_.ring_bytes) {
      return false;
    }
    slot_ = 0;
    barrier_ -= plan_.n_slots * kBarrierBytes;
    return true;
  }

  // REQUIRES: no tile is known that is not fetched. Finds the next ones, up to 32 of an item, of
  // which each lane looks one up.
  __device__ __forceinline__ void find_tiles(const DecodeParams& params, int lane) {
    if (next_ < n_tiles_) {
      const int page = page_of(min(next_ + lane, n_tiles_ - 1));
      unit_ = __ldg(&params.pages[first_page_ + page].unit) + unit_in_page();
    }
    while (next_ >= n_tiles_ && next_item_ >= 0) {
      if (next_item_ % kItemGroup == 0) {
        load_group(params, lane);
      }
      open_items(params, lane);
    }
    known_ = min(next_ + kWarpLanes, n_tiles_);
  }
  // Takes the next item of the group at hand, and those behind it until one has a tile for this
  // warp.
  __device__ __forceinline__ void open_items(const DecodeParams& params, int lane) {
#pragma unroll 1
    do {
      const WorkItem& item = group_[next_item_ % kItemGroup];
      first_ = first_tile_of_warp(kHeadDim, item.bits, warp_);
      const int n_tiles = item.n_pages * kTilesPerPage;
      next_ = 0;
      n_tiles_ = static_cast<int>(static_cast<unsigned>(n_tiles - first_ + kWarps - 1) / kWarps);
      first_page_ = item.first_page;
      tile_bytes_ = item.tile_bytes;
      const int page = page_of(lane);
      unit_ = item.pages[min(page, kItemPages - 1)].unit;
      if (page >= kItemPages && lane < n_tiles_) {
        unit_ = __ldg(&params.pages[first_page_ + page].unit);
      }
      unit_ += unit_in_page();
      next_item_ = item.next;
    } while (n_tiles_ == 0 && next_item_ % kItemGroup > 0);
    known_ = min(kWarpLanes, n_tiles_);
  }
  // The group that next_item_ is the first of.
  __device__ __forceinline__ void load_group(const DecodeParams& params, int lane) {
    const uint4 words =
        ptx::load_16(reinterpret_cast<const uint4*>(params.items + next_item_) + lane);
    __syncwarp();  // every lane has read what was there
    reinterpret_cast<uint4*>(group_)[lane] = words;
    __syncwarp();
  }
  // What the block will read beside the group's tiles, and the next group, come closer.
  __device__ __forceinline__ void prefetch_group(const DecodeParams& params, int lane) const {
    const int next = group_[kItemGroup - 1].next;
    if (next >= 0 && lane < kItemGroup) {
      ptx::prefetch(params.items + next + lane);
    }
    prefetch_sets(params, lane);
    if (warp_ < kItemGroup) {
      prefetch_tail(params, group_[warp_], lane);
    }
  }
  // What folding the query for the group's items will read: each warp asks for a set or two of
  // each.
  __device__ __forceinline__ void prefetch_sets(const DecodeParams& params, int lane) const {
    constexpr int kLineBytes = 128, kItemLanes = kWarpLanes / kItemGroup;
    const WorkItem& item = group_[lane / kItemLanes];
    const int at = lane % kItemLanes * kLineBytes;
#pragma unroll
    for (int turn = 0; turn < (kMaxFolds + kWarps - 1) / kWarps; ++turn) {
      const int n = turn * kWarps + warp_;
      const WorkItem::Fold fold = item.folds[min(n, kMaxFolds - 1)];
      if (n < item_folds(item.bits) && fold.bits != item_class_bits(kTailClass)) {
        const int64_t first = static_cast<int64_t>(item.first_set + fold.set) * kHeadDim;
        if (at < 4 * kHeadDim) {
          ptx::prefetch(params.key_sets + first * 2 + at / 2);
        }
        if (params.key_orders != nullptr && at < kHeadDim) {
          ptx::prefetch(params.key_orders + first + at);
        }
      }
    }
  }
  // The tail that follows an item. The length is read past L1: a launch that starts early may see
  // the one before.
  __device__ __forceinline__ static void prefetch_tail(const DecodeParams& params,
                                                       const WorkItem& item, int lane) {
    constexpr int kLineHalves = 64;
    if ((item.bits & kItemWithTail) == 0 || params.tail_k == nullptr) {
      return;
    }
    const int end = __ldcg(params.tail_tokens + item.sequence) * kHeadDim;
    const int64_t base = tail_offset(item.row, kHeadDim);
#pragma unroll 1
    for (int at = lane * kLineHalves; at < end; at += kWarpLanes * kLineHalves) {
      ptx::prefetch(params.tail_k + base + at);
      ptx::prefetch(params.tail_v + base + at);
    }
  }
  __device__ __forceinline__ int page_of(int tile) const {
    return (first_ + tile * kWarps) / kTilesPerPage;
  }
  // All tiles of a warp's item are at the same place of their pages.
  __device__ __forceinline__ uint32_t unit_in_page() const {
    return static_cast<uint32_t>(first_ % kTilesPerPage * tile_bytes_ / kTileAlignment);
  }

  // The next tile, if there is one, into the slot at hand.
  __device__ __forceinline__ void fill(const DecodeParams& params, int lane) {
    if (next_ == known_) {
      find_tiles(params, lane);
    }
    if (next_ < known_) {
      copy_tile(params, lane);
    }
  }
  __device__ __forceinline__ void copy_tile(const DecodeParams& params, int lane) {
    const uint32_t to = ptx::shared_address(slots_) + slot_;
    const uint32_t unit = __shfl_sync(ptx::kFullWarp, unit_, next_ & (kWarpLanes - 1));
    const uint8_t* from = params.pool + static_cast<uint64_t>(unit) * kTileAlignment;
#if __CUDA_ARCH__ >= 900
    if (ptx::elect_lane()) {
      ptx::barrier_expect_bytes(barrier_, tile_bytes_);
      ptx::bulk_copy(to, from, tile_bytes_, barrier_);
    }
#else
    for (int at = lane * 16; at < tile_bytes_; at += kWarpLanes * 16) {
      ptx::copy_16(to + at, from + at);
    }
    ptx::arrive_after_copies(barrier_);
#endif
    ++next_;
  }

  const DecodeSharedPlan& plan_;
  uint8_t* slots_;
  int slot_ = 0;      // the one at hand: bytes from the first
  uint32_t barrier_;  // its barrier
  uint32_t parity_ = 0;
  int next_item_;
  int warp_;
  WorkItem* group_;  // the items from the last multiple of kItemGroup on, in shared memory
  int first_ = 0;    // this warp's first tile of the item
  int first_page_ = 0;
  int n_tiles_ = 0;  // of this warp
  int next_ = 0;     // the next to fetch
  int known_ = 0;    // up to here the lanes know where the tiles are
  int tile_bytes_ = 0;
  uint32_t unit_ = 0;  // where tile (next_ / 32 * 32 + lane) is
};

}  // namespace zipcache::cuda
