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

  // `control` (kRingControlBytes) and `slots` are this warp's own.
  __device__ __forceinline__ TileRing(const DecodeParams& params, uint8_t* control, uint8_t* slots,
                                      const DecodeSharedPlan& plan, int first_item, int warp,
                                      int lane)
      : control_(ptx::shared_address(control)),
        slots_(slots),
        n_slots_(plan.n_slots),
        slot_bytes_(plan.slot_bytes),
        next_item_(first_item),
        warp_(warp) {
    if (lane == 0) {
      for (int slot = 0; slot < n_slots_; ++slot) {
#if __CUDA_ARCH__ >= 900
        ptx::barrier_init(barrier(slot), 1);
#else
        ptx::barrier_init(barrier(slot), kWarpLanes);
#endif
      }
#if __CUDA_ARCH__ >= 900
      ptx::fence_barrier_init();
#endif
    }
    __syncwarp();
    find_tile(params, lane);
    for (int slot = 0; slot < n_slots_; ++slot) {
      fill(params, slot, lane);
    }
  }

  // The tile at hand; blocks until its bytes are there.
  __device__ __forceinline__ const uint8_t* wait() const {
    ptx::barrier_wait(barrier(slot_), parity_);
    return slots_ + slot_ * slot_bytes_;
  }

  // Gives the slot at hand to the next tile and moves on.
  __device__ __forceinline__ void release(const DecodeParams& params, int lane) {
    __syncwarp();  // every lane has read the slot
    fill(params, slot_, lane);
    if (++slot_ == n_slots_) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  static_assert(kWarps % kTilesPerPage == 0);  // a warp's tiles of an item: one place in the pages

  __device__ __forceinline__ uint32_t barrier(int slot) const { return control_ + slot * 8; }

  // Makes next_ a tile that is there, and lets each lane look up one of the 32 from there on.
  __device__ __forceinline__ void find_tile(const DecodeParams& params, int lane) {
    while (next_ >= n_tiles_ && next_item_ >= 0) {
      const WorkItem* item = params.items + next_item_;
      // Before it is known whether there is such a page: one trip to memory instead of two.
      first_ = turn_.first(warp_);
      unit_ = __ldg(&item->pages[min(page_of(lane), kItemPages - 1)].unit);
      const uint4 head = ptx::load_16(item);
      const uint32_t bits = __ldg(&item->bits);
      next_ = 0;
      const int n_tiles = static_cast<int>(head.z) * kTilesPerPage;
      n_tiles_ = (n_tiles - first_ + kWarps - 1) / kWarps;
      turn_.pass(n_tiles);
      first_page_ = static_cast<int>(head.y);
      next_item_ = static_cast<int>(head.w);
      tile_bytes_ = tile_bytes(kHeadDim, item_class(bits));
      if (next_item_ >= 0) {
        ptx::prefetch(params.items + next_item_);
      }
    }
    const int page = page_of(next_ + lane);
    if (next_ % kWarpLanes == 0 && next_ + lane < n_tiles_ && page >= kItemPages) {
      unit_ = __ldg(&params.pages[first_page_ + page].unit);
    }
  }
  __device__ __forceinline__ int page_of(int tile) const {
    return (first_ + tile * kWarps) / kTilesPerPage;
  }

  __device__ __forceinline__ void fill(const DecodeParams& params, int slot, int lane) {
    if (next_ >= n_tiles_) {
      return;
    }
    const int holder = next_ % kWarpLanes;
    const uint32_t to = ptx::shared_address(slots_) + slot * slot_bytes_;
#if __CUDA_ARCH__ >= 900
    if (lane == holder) {
      ptx::barrier_expect_bytes(barrier(slot), tile_bytes_);
      ptx::bulk_copy(to, address_of(params, unit_), tile_bytes_, barrier(slot));
    }
#else
    const uint8_t* from = address_of(params, __shfl_sync(ptx::kFullWarp, unit_, holder));
    for (int at = lane * 16; at < tile_bytes_; at += kWarpLanes * 16) {
      ptx::copy_16(to + at, from + at);
    }
    ptx::arrive_after_copies(barrier(slot));
#endif
    ++next_;
    find_tile(params, lane);
  }
  __device__ __forceinline__ const uint8_t* address_of(const DecodeParams& params,
                                                       uint32_t unit) const {
    return params.pool + static_cast<uint64_t>(unit) * kTileAlignment +
           first_ % kTilesPerPage * tile_bytes_;
  }

  uint32_t control_;
  uint8_t* slots_;
  int n_slots_;
  int slot_bytes_;
  int next_item_;
  int warp_;
  WarpTurn<kWarps> turn_;
  int first_ = 0;  // this warp's first tile of the item
  int first_page_ = 0;
  int n_tiles_ = 0;  // of this warp
  int next_ = 0;     // the next to fetch
  int tile_bytes_ = 0;
  uint32_t unit_ = 0;  // of the page of tile next_ / 32 * 32 + lane
  int slot_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace zipcache::cuda
