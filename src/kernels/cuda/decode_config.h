// Sizes of the decode kernel that host and device must agree on: warps, shared memory, workspace.
#pragma once

#include "kernels/cuda/params.h"

namespace zipcache::cuda {

inline constexpr int kMaxGroup = 8;  // query heads per KV head: columns of one matrix instruction
inline constexpr int kMaxRingSlots = 8;
// A ring of more than two slots is not larger. The more tiles a launch asks for at once, the later
// come the first ones: 1 x 32k of the default took 14.7 us with three or four slots, 13.5 with two.
inline constexpr int kRingBytes = 6656;

// Two blocks of 8 warps per SM (measured against 4 to 6 blocks of 4 and 2 of 10: the fewer blocks
// share a row, the shorter its merge, and more warps do not stream faster). head_dim 256 has twice
// the accumulators.
ZC_HOST_DEVICE constexpr int decode_warps(int head_dim) { return head_dim == 256 ? 4 : 8; }
ZC_HOST_DEVICE constexpr int decode_threads(int head_dim) {
  return decode_warps(head_dim) * kWarpLanes;
}
inline constexpr int kDecodeBlocksPerSm = 2;

// Query heads that a lane works for: half of the matrix instruction's columns, each twice, serve
// groups up to 4.
inline constexpr int kMaxLaneHeads = 2;
ZC_HOST_DEVICE constexpr int decode_lane_heads(int group) { return group <= 4 ? 1 : kMaxLaneHeads; }

// Whether rows may be clusters. Where a lane works for two heads there is no register left for it
// (8 x 32k, groups of 8: 61.4 us without, 62.7 with it).
ZC_HOST_DEVICE constexpr bool decode_has_clusters(int lane_heads) { return lane_heads == 1; }

// What a launch decides about shared memory.
struct DecodeSharedPlan {
  int group = 1;          // query heads per KV head
  int group_inverse = 0;  // 2^16 / group, rounded up: n * this >> 16 is n / group, of small n
  int n_slots = 0;        // of each warp's ring, 1..kMaxRingSlots
  int slot_bytes = 0;     // the largest tile of the launch
  int ring_bytes = 0;     // n_slots * slot_bytes: multiplied in the kernel, it takes a register
};

// Which tile of an item is a warp's first; every decode_warps()-th from there on is its own too.
// The warps take turns across a block's items: of items with fewer tiles than warps, one after the
// other does the next. (What stands above the turn in `item_bits` counts whole rounds of warps.)
ZC_HOST_DEVICE constexpr int first_tile_of_warp(int head_dim, std::uint32_t item_bits, int warp) {
  const auto warps = static_cast<unsigned>(decode_warps(head_dim));
  return static_cast<int>((static_cast<unsigned>(warp) - (item_bits >> kItemTurnShift)) % warps);
}

// Columns of a query operand: the lanes' 16-byte units of 32 channels of all heads.
ZC_HOST_DEVICE constexpr int query_columns(int lane_heads) {
  return kWarpLanes * lane_heads / kMaxLaneHeads;
}
ZC_HOST_DEVICE constexpr int query_operand_bytes(int head_dim, int lane_heads) {
  return head_dim / 32 * query_columns(lane_heads) * 16;
}
inline constexpr int kQueryScalarBytes = kMaxGroup * 8;  // of an operand
// What the query is folded for at a time: scale sets, and a tail. Groups above 4 have operands
// twice as large; a fifth would leave an SM with one block (8 x 32k, groups of 8: 62.8 to 66.1 us).
ZC_HOST_DEVICE constexpr int max_folds(int group) {
  return decode_lane_heads(group) == 1 ? kMaxFolds : 4;
}

// Shared memory of a block:
//   [query operands][scalars of each]
//   [max and sum of each warp and head][outputs of each warp and head]
//   [flag, barriers of each warp's ring][items of each warp][ring slots of each warp]
// Slots are aligned like tiles: copies to places 16 bytes further on take 7 % longer.
struct DecodeShared {
  int query_scalars, states, outputs, control, items, slots;  // offsets; query operands are at 0
};
inline constexpr int kRingControlBytes = kMaxRingSlots * 8;
inline constexpr int kFlagBytes = 64;
inline constexpr int kItemGroupBytes = kWarpLanes * 16;
// Floats between the outputs of two heads; + 4 spreads the lanes of a store over the banks.
ZC_HOST_DEVICE constexpr int output_stride(int head_dim) { return head_dim + 4; }
ZC_HOST_DEVICE constexpr DecodeShared decode_shared(int head_dim, int group) {
  const int warps = decode_warps(head_dim);
  DecodeShared at{};
  at.query_scalars = max_folds(group) * query_operand_bytes(head_dim, decode_lane_heads(group));
  at.states = at.query_scalars + max_folds(group) * kQueryScalarBytes;
  at.outputs = at.states + warps * kMaxGroup * 8;
  at.control = at.outputs + warps * group * output_stride(head_dim) * 4;
  const int end = at.control + kFlagBytes + warps * kRingControlBytes;
  at.items = (end + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
  at.slots = at.items + warps * kItemGroupBytes;
  return at;
}
ZC_HOST_DEVICE constexpr int decode_shared_bytes(int head_dim, const DecodeSharedPlan& plan) {
  return decode_shared(head_dim, plan.group).slots + decode_warps(head_dim) * plan.ring_bytes;
}

// Floats of one partial result: [group, head_dim] outputs, [group, 4] (max, sum, unused).
ZC_HOST_DEVICE constexpr int partial_floats(int head_dim, int group) {
  return group * (head_dim + 4);
}

}  // namespace zipcache::cuda
