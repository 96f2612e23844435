// Sizes of the decode kernel that host and device must agree on: warps, shared memory, workspace.
#pragma once

#include "kernels/cuda/device_page.h"

namespace zipcache::cuda {

inline constexpr int kMaxGroup = 8;  // query heads per KV head: columns of one matrix instruction
inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpLanes;
inline constexpr int kMaxRingSlots = 8;

// Blocks per SM that registers should allow: 16 warps hide the latency of the serial score ->
// weight -> value chain of one tile; head_dim 256 has twice the accumulators.
ZC_HOST_DEVICE constexpr int min_blocks(int head_dim) { return head_dim == 256 ? 2 : 4; }

// What a launch decides about shared memory.
struct DecodeSharedPlan {
  int n_slots = 0;     // of each warp's ring, 2..kMaxRingSlots
  int slot_bytes = 0;  // the largest tile of the launch
};

// Shared memory of a block:
//   [barriers and words of each warp's ring][flag][max and sum of each warp and head]
//   [outputs of each warp and head][ring slots of each warp]
inline constexpr int kRingControlBytes = kMaxRingSlots * 16;  // 8 of barrier, 4 of word, padded
inline constexpr int kFlagOffset = kDecodeWarps * kRingControlBytes;
inline constexpr int kStateOffset = kFlagOffset + 16;
inline constexpr int kOutputOffset = kStateOffset + kDecodeWarps * kMaxGroup * 8;
// Floats between the outputs of two heads; + 4 spreads the lanes of a store over the banks.
ZC_HOST_DEVICE constexpr int output_stride(int head_dim) { return head_dim + 4; }
ZC_HOST_DEVICE constexpr int slots_offset(int head_dim, int group) {
  const int end = kOutputOffset + kDecodeWarps * group * output_stride(head_dim) * 4;
  return (end + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
}
ZC_HOST_DEVICE constexpr int decode_shared_bytes(int head_dim, int group,
                                                 const DecodeSharedPlan& plan) {
  return slots_offset(head_dim, group) + kDecodeWarps * plan.n_slots * plan.slot_bytes;
}

// Floats of one partial result: [group, head_dim] outputs, [group, 4] (max, sum, unused).
ZC_HOST_DEVICE constexpr int partial_floats(int head_dim, int group) {
  return group * (head_dim + 4);
}

}  // namespace zipcache::cuda
