// How results merge where a block's part of a row ends: those of its warps in shared memory, and,
// by the last block of the row, the partial results of all.
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/decode_row.cuh"

namespace zipcache::cuda {

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
    float weight = 0;
#pragma unroll 1
    for (int first = 0; first < count; first += kBatch) {
      HeadSlice<kHeadDim> of[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        of[n].clear();
        if (first + n < count) {
          load(first + n, of[n]);
        }
      }
      if (first == 0) {
        weight = rescale(state, lane < count);
      }
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        slice.add(of[n], __shfl_sync(ptx::kFullWarp, weight, (first + n) % kWarpLanes));
      }
    }
  }
  // A result of each warp of the block; their outputs are `stride` floats apart.
  __device__ __forceinline__ void merge_warps(const float* outputs, int stride,
                                              const float2* states, int lane) {
    constexpr int kWarps = decode_warps(kHeadDim);
    HeadSlice<kHeadDim> of[kWarps];
#pragma unroll
    for (int n = 0; n < kWarps; ++n) {
      of[n].load(outputs + n * stride, lane);
    }
    const float weight = rescale(lane < kWarps ? states[lane] : float2{kNoScore, 0}, lane < kWarps);
#pragma unroll
    for (int n = 0; n < kWarps; ++n) {
      slice.add(of[n], __shfl_sync(ptx::kFullWarp, weight, n));
    }
  }
  __device__ __forceinline__ void finish() {
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, offset);
    }
  }

 private:
  // To the maximum that the lanes' results have too. Returns the weight of this lane's.
  __device__ __forceinline__ float rescale(float2 state, bool is_result) {
    float largest = is_result ? state.x : kNoScore;
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(ptx::kFullWarp, largest, offset));
    }
    largest = fmaxf(largest, max);
    const float factor = ptx::exp2(max - largest);
    const float weight = is_result ? ptx::exp2(state.x - largest) : 0.0f;
    sum = sum * factor + (is_result ? weight * state.y : 0.0f);
    max = largest;
    slice.scale(factor);
    return weight;
  }
};

// Results of a block's warps in shared memory, not normalized: outputs [warps][group] at
// output_stride(), (max, sum) [group][warps].
struct WarpResults {
  float* outputs;
  float2* states;
};

template <int kHeadDim, int kLaneHeads>
__device__ __forceinline__ void store_state(const RowState<kHeadDim, kLaneHeads>& state,
                                            const WarpResults& to, int group, int warp, int lane) {
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
        to.states[head * decode_warps(kHeadDim) + warp] = {state.max[e], sum};
      }
      float* output = to.outputs + (warp * group + head) * output_stride(kHeadDim) + g * 8;
#pragma unroll
      for (int block = 0; block < kHeadDim / 16; block += 2) {
        *reinterpret_cast<float4*>(output + block / 4 * 64 + block % 4 * 2) = {
            state.acc[block][e], state.acc[block][2 + e], state.acc[block + 1][e],
            state.acc[block + 1][2 + e]};
      }
    }
  }
}

// A row's partial results take the places of the warps' own: each head has one or more warps, each
// of which merges a run of the results. The other warps have no result of that head.
template <int kHeadDim>
__device__ __forceinline__ void merge_partials(const DecodeParams& params, int first_partial,
                                               int n_partials, int group, const WarpResults& to,
                                               int warp, int lane) {
  constexpr int kWarps = decode_warps(kHeadDim);
  // A row of all blocks of a large device has 33 results, of which a warp takes 17: two trips to
  // memory. All 17 at once spill.
  constexpr int kPartialBatch = 9 * 4 / (kHeadDim / kWarpLanes);
  const int64_t stride = partial_floats(kHeadDim, group);
  const float* partials = params.partials + first_partial * stride;
  int runs_log2 = 0;  // per head
  while (group << (runs_log2 + 1) <= kWarps) {
    ++runs_log2;
  }
  const int run = warp & ((1 << runs_log2) - 1);
  const int begin = n_partials * run >> runs_log2, end = n_partials * (run + 1) >> runs_log2;
#pragma unroll 1
  for (int head = warp >> runs_log2; head < group; head += kWarps >> runs_log2) {
    HeadMerge<kHeadDim> merged;
#pragma unroll 1
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
    merged.slice.store(to.outputs + (run * group + head) * output_stride(kHeadDim), 1.0f, lane);
    float2* const states = to.states + head * kWarps;
    if (lane == 0) {
      states[run] = {merged.max, merged.sum};
    }
    if (run == 0 && lane < kWarps && lane >> runs_log2 != 0) {
      states[lane] = {kNoScore, 0};
    }
  }
}

// What the other blocks of the cluster have merged of their warps takes the places of warps 1 and
// on here, for the heads that this block goes on with, every kClusterBlocks-th from its rank on;
// the other warps have no result. All threads of the cluster call this, and ptx::cluster_wait()
// before they change what stands in the places of warp 0.
template <int kHeadDim>
__device__ __forceinline__ void gather_cluster(const WarpResults& results, int rank, int group,
                                               int warp, int lane) {
  constexpr int kWarps = decode_warps(kHeadDim), kOthers = kClusterBlocks - 1;
  static_assert(kClusterBlocks <= kWarps);
  ptx::cluster_arrive();
  ptx::cluster_wait();
#pragma unroll 1
  for (int n = warp;; n += kWarps) {
    const int other = n % kOthers + 1, head = rank + n / kOthers * kClusterBlocks;
    if (head >= group) {
      break;
    }
    const int block = (rank + other) % kClusterBlocks;
    const float* from = results.outputs + head * output_stride(kHeadDim);
    float* to = results.outputs + (other * group + head) * output_stride(kHeadDim);
    float2* const states = results.states + head * kWarps;
#pragma unroll
    for (int at = lane * 4; at < kHeadDim; at += kWarpLanes * 4) {
      *reinterpret_cast<uint4*>(to + at) = ptx::load_of_block(from + at, block);
    }
    if (lane == 0) {
      const uint4 state = ptx::load_of_block(states, block);
      states[other] = {__uint_as_float(state.x), __uint_as_float(state.y)};
    }
    if (lane >= kClusterBlocks && lane < kWarps) {
      states[lane] = {kNoScore, 0};
    }
  }
  ptx::cluster_arrive();
  __syncthreads();
}

// The warps' unnormalised states become the row's result, or one of its partial results. All
// threads call this; shared memory is free again when it returns.
//
// The same code merges the results of the block's warps, of a cluster's blocks and, in a row's last
// block, what its warps have merged of all blocks': what only that block runs is cold wherever
// other kernels ran between (decision 5).
template <int kHeadDim, int kLaneHeads>
__device__ __forceinline__ void finish_part(const DecodeParams& params, int group, int item,
                                            int row, const RowState<kHeadDim, kLaneHeads>& state,
                                            uint8_t* shared, int warp, int lane) {
  constexpr int kWarps = decode_warps(kHeadDim);
  const DecodeShared at = decode_shared(kHeadDim, group);
  const WarpResults results{reinterpret_cast<float*>(shared + at.outputs),
                            reinterpret_cast<float2*>(shared + at.states)};
  uint32_t* last_flag = reinterpret_cast<uint32_t*>(shared + at.control);
  const int partial = __ldg(&params.items[item].partial);
  const int first_partial = __ldg(&params.items[item].first_partial);
  const int n_partials = __ldg(&params.items[item].n_partials);
  const bool in_cluster = decode_has_clusters(kLaneHeads) && n_partials == 0;
  store_state(state, results, group, warp, lane);
  __syncthreads();

  int rank = -1;  // in the cluster, when its blocks go on with a share of the heads each
#pragma unroll 1
  for (bool of_row = n_partials == 1;; of_row = true) {
#pragma unroll 1
    for (int head = warp; head < group; head += kWarps) {
      if (rank >= 0 && head % kClusterBlocks != rank) {
        continue;
      }
      HeadMerge<kHeadDim> merged;
      float* const outputs = results.outputs + head * output_stride(kHeadDim);
      float2* const states = results.states + head * kWarps;
      merged.merge_warps(outputs, group * output_stride(kHeadDim), states, lane);
      merged.finish();
      const int64_t at_head = static_cast<int64_t>(row) * group + head;
      if (of_row) {
        merged.slice.store(params.out + at_head * kHeadDim,
                           merged.sum > 0 ? 1.0f / merged.sum : 0.0f, lane);
        if (lane == 0 && params.lse != nullptr) {
          params.lse[at_head] = merged.sum > 0 ? merged.max + log2f(merged.sum) : -INFINITY;
        }
      } else {
        float* to = outputs;
        float2* to_state = states;
        if (!in_cluster) {
          to = params.partials + partial * static_cast<int64_t>(partial_floats(kHeadDim, group));
          to_state = reinterpret_cast<float2*>(to + group * kHeadDim + head * 4);
          to += head * kHeadDim;
        }
        merged.slice.store(to, 1.0f, lane);
        if (lane == 0) {
          *to_state = {merged.max, merged.sum};
        }
      }
    }
    __syncthreads();
    if (of_row) {
      break;
    }
    if (in_cluster) {
      rank = ptx::cluster_rank();
      gather_cluster<kHeadDim>(results, rank, group, warp, lane);
      continue;
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
    if (*last_flag == 0) {
      break;
    }
    merge_partials<kHeadDim>(params, first_partial, n_partials, group, results, warp, lane);
    __syncthreads();
  }
  if (in_cluster) {
    ptx::cluster_wait();
  }
}

}  // namespace zipcache::cuda
