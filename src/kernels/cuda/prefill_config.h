// Sizes of the prefill kernel that host and device must agree on.
#pragma once

#include "kernels/cuda/params.h"

namespace zipcache::cuda {

inline constexpr int kPrefillWarps = 4;
inline constexpr int kPrefillThreads = kPrefillWarps * kWarpLanes;
// Wider blocks would share the expanded keys among more rows, and spill.
// Before sm_90 three do not fit either.
ZC_HOST_DEVICE constexpr int prefill_blocks_per_sm(int head_dim) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return head_dim == 64 ? 3 : 2;
#else
  return head_dim == 256 ? 2 : 3;
#endif
}
inline constexpr int kPrefillRows = kPrefillWarps * 16;  // (query, head of the group) of a block

ZC_HOST_DEVICE constexpr int prefill_tile_queries(int group) { return kPrefillRows / group; }
ZC_HOST_DEVICE constexpr int prefill_tiles(const PrefillParams& p) {
  const int queries = prefill_tile_queries(p.n_heads / p.n_kv_heads);
  return (p.n_queries + queries - 1) / queries;
}
// Rows of the first, the largest tile.
ZC_HOST_DEVICE constexpr int prefill_tile_rows(const PrefillParams& p) {
  const int group = p.n_heads / p.n_kv_heads;
  const int queries = prefill_tile_queries(group);
  return (p.n_queries < queries ? p.n_queries : queries) * group;
}

}  // namespace zipcache::cuda
