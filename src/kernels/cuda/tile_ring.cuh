// How packed tiles reach a warp: each warp owns a ring of slots in shared memory and fills it
// itself, as many tiles ahead as there are slots. No warp waits for another while it streams.
//
// On sm_90 a tile is one bulk copy issued by one lane; before that it is 16-byte asynchronous
// copies by all lanes. Both arrive at the slot's barrier.
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {

__device__ __forceinline__ WorkItem load_item(const DecodeParams& params, int index) {
  const uint4 low = ptx::load_16(params.items + index);
  const uint4 high = ptx::load_16(reinterpret_cast<const uint4*>(params.items + index) + 1);
  return {static_cast<int>(low.x),  static_cast<int>(low.y),  static_cast<int>(low.z),
          static_cast<int>(low.w),  static_cast<int>(high.x), static_cast<int>(high.y),
          static_cast<int>(high.z), static_cast<int>(high.w)};
}

// The block's tiles that belong to one warp, in order: of each item the tiles warp, warp + 4, ...
// The page entry of the current tile is loaded one step ahead of its use.
class TileCursor {
 public:
  __device__ __forceinline__ TileCursor(const DecodeParams& params, int first_item, int warp)
      : first_page_(0), n_tiles_(0), tile_(0), next_(first_item) {
    settle(params, warp);
  }

  __device__ __forceinline__ bool done() const { return tile_ >= n_tiles_; }
  // Fields of the current PageEntry.
  __device__ __forceinline__ uint32_t unit() const { return unit_; }
  __device__ __forceinline__ uint32_t set() const { return info_ & 0xffff; }
  __device__ __forceinline__ int tokens() const { return info_ >> 16 & 0xff; }
  __device__ __forceinline__ uint32_t cls() const { return info_ >> 24; }
  __device__ __forceinline__ int tile_of_page() const { return tile_ % kTilesPerPage; }

  __device__ __forceinline__ void advance(const DecodeParams& params, int warp) {
    tile_ += kDecodeWarps;
    settle(params, warp);
  }

 private:
  __device__ __forceinline__ void settle(const DecodeParams& params, int warp) {
    while (tile_ >= n_tiles_ && next_ >= 0) {
      const WorkItem item = load_item(params, next_);
      first_page_ = item.first_page;
      n_tiles_ = item.n_pages * kTilesPerPage;
      next_ = item.next;
      tile_ = warp;
    }
    if (tile_ < n_tiles_) {
      const uint2 raw =
          __ldg(reinterpret_cast<const uint2*>(params.pages + first_page_ + tile_ / kTilesPerPage));
      unit_ = raw.x;
      info_ = raw.y;
    }
  }

  int first_page_;
  int n_tiles_;
  int tile_;
  int next_;
  uint32_t unit_, info_;
};

// What a warp must know of the tile in a slot.
struct TileInfo {
  int tokens;  // 0..32 of the tile are in use
  int cls;
  int set;
};

template <int kHeadDim>
class TileRing {
 public:
  // `control` (kRingControlBytes) and `slots` are this warp's own.
  __device__ __forceinline__ TileRing(uint8_t* control, uint8_t* slots, int n_slots, int slot_bytes)
      : control_(ptx::shared_address(control)),
        info_(reinterpret_cast<uint32_t*>(control + kMaxRingSlots * 8)),
        slots_(slots),
        n_slots_(n_slots),
        slot_bytes_(slot_bytes) {}

  __device__ __forceinline__ void start(const DecodeParams& params, TileCursor& cursor, int warp,
                                        int lane) {
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
    for (int slot = 0; slot < n_slots_; ++slot) {
      fill(params, cursor, slot, warp, lane);
    }
    __syncwarp();
  }

  // The tile at hand; blocks until its bytes are there.
  __device__ __forceinline__ const uint8_t* wait() const {
    ptx::barrier_wait(barrier(slot_), parity_);
    return slots_ + slot_ * slot_bytes_;
  }
  __device__ __forceinline__ TileInfo info() const {
    const uint32_t word = info_[slot_];
    return {static_cast<int>(word & 0xff), static_cast<int>(word >> 8 & 0xff),
            static_cast<int>(word >> 16)};
  }

  // Gives the slot at hand to the next tile of the cursor and moves on.
  __device__ __forceinline__ void release(const DecodeParams& params, TileCursor& cursor, int warp,
                                          int lane) {
    __syncwarp();  // every lane has read the slot
    fill(params, cursor, slot_, warp, lane);
    if (++slot_ == n_slots_) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int slot) const { return control_ + slot * 8; }

  __device__ __forceinline__ void fill(const DecodeParams& params, TileCursor& cursor, int slot,
                                       int warp, int lane) {
    if (cursor.done()) {
      return;
    }
    const PageClass cls = params.classes[cursor.cls()];
    const int bytes = tile_bytes(kHeadDim, cls.key_bits, cls.value_bits);
    const int tile = cursor.tile_of_page();
    const int tokens = min(max(cursor.tokens() - tile * kTileTokens, 0), kTileTokens);
    const uint8_t* from =
        params.pool + static_cast<uint64_t>(cursor.unit()) * kTileAlignment + tile * bytes;
    const uint32_t to = ptx::shared_address(slots_) + slot * slot_bytes_;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
      info_[slot] = tokens | cursor.cls() << 8 | cursor.set() << 16;
      ptx::barrier_expect_bytes(barrier(slot), bytes);
      ptx::bulk_copy(to, from, bytes, barrier(slot));
    }
#else
    if (lane == 0) {
      info_[slot] = tokens | cursor.cls() << 8 | cursor.set() << 16;
    }
    for (int at = lane * 16; at < bytes; at += kWarpLanes * 16) {
      ptx::copy_16(to + at, from + at);
    }
    ptx::arrive_after_copies(barrier(slot));
#endif
    cursor.advance(params, warp);
  }

  uint32_t control_;
  uint32_t* info_;
  uint8_t* slots_;
  int n_slots_;
  int slot_bytes_;
  int slot_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace zipcache::cuda
