// The query as an operand of the matrix instruction, folded with the scales of the keys that it
// meets. See docs/device_format.md for the algebra.
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/unpack.cuh"

namespace zipcache::cuda {

inline constexpr int kHalfBits = 16;  // "width" of the fp16 tail

// Which keys a query is folded for: a scale set and the widths of its pages, or fp16 rows.
struct FoldKeys {
  static constexpr int kNone = -1, kTail = -2;
  int set = kNone;  // index into DecodeParams::key_sets, or one of these
  PageClass cls;
};

// The query as the operand of one width and scale set: q^ = scale * q * s / r, times a power of two
// `norm` per head that keeps fp16 in range. The block folds it together and shares it; the operand
// that is wanted next is folded with it, by the warps that have nothing to do otherwise, and later
// taken without a barrier.
template <int kHeadDim>
class QueryOperand {
 public:
  static constexpr int kChunks = kHeadDim / 32;
  static constexpr int kWarps = decode_warps(kHeadDim);

  float start[2];         // what a score of heads 2i, 2i+1 starts from: minima and offsets, x norm
  float inverse_norm[2];  // of heads 2i, 2i+1

  // `words`: 2 * kMaxGroup * kHeadDim halves, `stats`: 4 * query_stat_floats(), both shared memory.
  __device__ __forceinline__ QueryOperand(const DecodeParams& params, uint8_t* words,
                                          uint8_t* stats)
      : params_(params),
        words_(reinterpret_cast<uint4*>(words)),
        stats_(reinterpret_cast<float*>(stats)) {}

  // This lane's column of [head_dim / 32][32 lanes]: the operands of two k-steps.
  __device__ __forceinline__ const uint4* column(int lane) const {
    return words_ + which_ * kWords + lane;
  }

  // Takes the operand of `keys`, which was folded as `next`, or folds it, and `next`, if that is
  // one. All warps call this with the same; the operand before is no longer in use when it folds.
  // `q` is the query of the KV head, [group, head_dim].
  __device__ __forceinline__ void take(const float* q, FoldKeys keys, FoldKeys next, int warp,
                                       int lane) {
    if (keys.set == next_set_) {
      which_ = 1;
      next_set_ = FoldKeys::kNone;
    } else {
      fold(q, keys, next, warp, lane);
      which_ = 0;
      next_set_ = next.set;
    }
    load_scalars(keys, lane);
  }
  // What was folded is of another query.
  __device__ __forceinline__ void forget() { next_set_ = FoldKeys::kNone; }

 private:
  static constexpr int kWords = kChunks * kWarpLanes;
  static constexpr int kStats = query_stat_floats(kHeadDim);
  static constexpr int kKind = kChunks * kMaxGroup;  // of the statistics: [kind][head][chunk]

  __device__ __forceinline__ float log2_scale() const { return params_.scale * 1.44269504088896f; }
  __device__ __forceinline__ int group() const { return params_.n_heads / params_.n_kv_heads; }
  // Of the operand `which` of the fold at hand.
  __device__ __forceinline__ float* stats(int which) const {
    return stats_ + (turn_ * 2 + which) * kStats;
  }
  __device__ __forceinline__ const HalfBits* scales(int set) const {
    return params_.key_sets + static_cast<int64_t>(set) * 2 * kHeadDim;
  }

  // 8 channels of q and of q^ without the norm: those from `at` on, in the stored order.
  __device__ __forceinline__ void load_folded(const float* q, FoldKeys keys, int chunk, int at,
                                              uint32_t (&q_pairs)[4], float (&folded)[8]) const {
    const PageClass cls = keys.cls;
    const uint4 x =
        cls.wide_chunks == 0
            ? load_8(q + at)
            : load_channels(q, params_.key_orders + static_cast<int64_t>(keys.set) * kHeadDim + at);
    uint4 s = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    if (keys.set >= 0) {
      s = ptx::load_16(scales(keys.set) + at);
    }
    const uint32_t s_pairs[4] = {s.x, s.y, s.z, s.w};
    q_pairs[0] = x.x, q_pairs[1] = x.y, q_pairs[2] = x.z, q_pairs[3] = x.w;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // its channels share their factor r
      const float factor =
          log2_scale() * key_inverse_factor(cls.chunk_bits(chunk), pair >> 1, pair & 1);
      folded[pair * 2] = ptx::low_half(q_pairs[pair]) * ptx::low_half(s_pairs[pair]) * factor;
      folded[pair * 2 + 1] = ptx::high_half(q_pairs[pair]) * ptx::high_half(s_pairs[pair]) * factor;
    }
  }

  __device__ __forceinline__ void fold(const float* q, FoldKeys keys, FoldKeys next, int warp,
                                       int lane) {
    const int head = lane >> 2, i = lane & 3;
    const bool used = head < group();
    const int n_chunks = next.set == FoldKeys::kNone ? kChunks : 2 * kChunks;
    turn_ ^= 1;
    const float* own_q = q + (used ? head : 0) * kHeadDim;
#pragma unroll 1
    for (int unit = warp; unit < n_chunks; unit += kWarps) {
      const FoldKeys of = unit < kChunks ? keys : next;
      const int chunk = unit % kChunks, at = chunk * 32 + i * 8;
      uint32_t q_pairs[4];
      float folded[8], of_all = 0, minimum = 0;
      load_folded(own_q, of, chunk, at, q_pairs, folded);
      uint4 m = {0, 0, 0, 0};
      if (of.set >= 0) {
        m = ptx::load_16(scales(of.set) + kHeadDim + at);
      }
      const uint32_t m_pairs[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        minimum += ptx::low_half(q_pairs[pair]) * ptx::low_half(m_pairs[pair]) +
                   ptx::high_half(q_pairs[pair]) * ptx::high_half(m_pairs[pair]);
        of_all = fmaxf(of_all, fmaxf(fabsf(folded[pair * 2]), fabsf(folded[pair * 2 + 1])));
      }
      of_all = fmaxf(of_all, __shfl_xor_sync(ptx::kFullWarp, of_all, 1));
      of_all = fmaxf(of_all, __shfl_xor_sync(ptx::kFullWarp, of_all, 2));
      minimum += __shfl_xor_sync(ptx::kFullWarp, minimum, 1);
      minimum += __shfl_xor_sync(ptx::kFullWarp, minimum, 2);
      if (i == 0) {
        float* to = stats(unit / kChunks) + head * kChunks + chunk;
        to[kLargest] = of_all;
        to[kMinima] = minimum;
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int unit = warp; unit < n_chunks; unit += kWarps) {  // again: kept, it would spill
      const FoldKeys of = unit < kChunks ? keys : next;
      const int chunk = unit % kChunks;
      float* const of_fold = stats(unit / kChunks);
      uint32_t q_pairs[4], rounded[4];
      float folded[8], sum = 0;
      load_folded(own_q, of, chunk, chunk * 32 + i * 8, q_pairs, folded);
      const float norm = used ? __int_as_float(norm_field(of_fold, head) << 23) : 0.0f;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        rounded[pair] = ptx::pack_half2(folded[pair * 2] * norm, folded[pair * 2 + 1] * norm);
        sum += ptx::low_half(rounded[pair]) + ptx::high_half(rounded[pair]);
      }
      words_[unit * kWarpLanes + lane] = {rounded[0], rounded[1], rounded[2], rounded[3]};
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 1);
      sum += __shfl_xor_sync(ptx::kFullWarp, sum, 2);
      if (i == 0) {
        of_fold[kSums + head * kChunks + chunk] = sum;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void load_scalars(FoldKeys keys, int lane) {
    const float* const of_fold = stats(which_);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int of = (lane & 3) * 2 + e, field = norm_field(of_fold, of);
      const auto plus = [](float x, float y) { return x + y; };
      const float minimum = over_chunks(of_fold + kMinima + of * kChunks, plus);
      const float sum = over_chunks(of_fold + kSums + of * kChunks, plus);
      // The offset comes from the rounded operand, so it cancels exactly.
      const float offset = keys.set == FoldKeys::kTail ? 0.0f : kKeyOffset * sum;
      start[e] =
          of < group() ? minimum * log2_scale() * __int_as_float(field << 23) - offset : 0.0f;
      inverse_norm[e] = __int_as_float((254 - field) << 23);
    }
  }

  // 8 channels, rounded to fp16: as they stand, or those that `order` names.
  __device__ __forceinline__ static uint4 load_8(const float* row) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(row));
    const float4 high = __ldg(reinterpret_cast<const float4*>(row) + 1);
    return {ptx::pack_half2(low.x, low.y), ptx::pack_half2(low.z, low.w),
            ptx::pack_half2(high.x, high.y), ptx::pack_half2(high.z, high.w)};
  }
  __device__ __forceinline__ static uint4 load_channels(const float* row, const uint8_t* order) {
    const uint2 at = __ldg(reinterpret_cast<const uint2*>(order));
    const auto pair = [&](uint32_t two) {
      return ptx::pack_half2(__ldg(row + (two & 0xff)), __ldg(row + (two >> 8 & 0xff)));
    };
    return {pair(at.x), pair(at.x >> 16), pair(at.y), pair(at.y >> 16)};
  }
  // All chunks of a head's statistics, two at a time.
  template <typename Combine>
  __device__ __forceinline__ static float over_chunks(const float* of_head, Combine combine) {
    float all = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(of_head + chunk);
      all = combine(combine(all, pair.x), pair.y);
    }
    return all;
  }
  // norm = 2^k such that the largest operand is in [512, 1024): its exponent field is 127 + 9.
  __device__ __forceinline__ static int norm_field(const float* of_fold, int head) {
    const float of_all = over_chunks(of_fold + kLargest + head * kChunks,
                                     [](float x, float y) { return fmaxf(x, y); });
    const int field = __float_as_int(of_all) >> 23;
    return of_all > 0 ? min(max(127 + 127 + 9 - field, 1), 253) : 127;
  }

  static constexpr int kLargest = 0, kMinima = kKind, kSums = 2 * kKind;  // kinds of statistics

  const DecodeParams& params_;
  uint4* words_;
  // Of two folds, in turn: warps that are ahead write one while others still read the other.
  float* stats_;
  int turn_ = 0;
  int which_ = 0;                   // of the two operands: the one at hand
  int next_set_ = FoldKeys::kNone;  // what the other is of
};

}  // namespace zipcache::cuda
