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

// The query as the operand of one width and scale set: q^ = scale * q * s / p, times a power of two
// `norm` per head that keeps fp16 in range. A warp folds all channels of a head, the block shares
// what its warps have folded. The operand that is wanted next is folded with it, by the warps that
// have no head left to fold, and later taken without a barrier.
//
// Column c of the matrix instruction is head c; where a lane has one head (groups up to 4), columns
// 2c and 2c + 1 are head c, so that no lane works for a head that is not there. Columns beyond the
// group repeat its first head.
template <int kHeadDim, int kLaneHeads>
class QueryOperand {
 public:
  static constexpr int kColumns = query_columns(kLaneHeads);

  float start[kLaneHeads];    // what a score of a head starts from: the minima, in its units
  float inverse[kLaneHeads];  // its units: 1 / norm, and 1 / kSubnormalUnit for codes

  // In shared memory: `words`, 4 operands of query_operand_bytes(), `scalars`, 4 of
  // kQueryScalarBytes, and `row`, head_dim floats of this warp that are free during take().
  __device__ __forceinline__ QueryOperand(const DecodeParams& params, int group, uint8_t* words,
                                          uint8_t* scalars, float* row, int lane)
      : params_(params),
        group_(group),
        words_(reinterpret_cast<uint4*>(words)),
        scalars_(reinterpret_cast<float2*>(scalars)),
        row_(row) {
    const int head = (lane >> 2) * kLaneHeads / kMaxLaneHeads;
    column_ = (head < group ? head : 0) * 4 + (lane & 3);
  }

  // This lane's column of [head_dim / 32][kColumns]: the operands of two k-steps.
  __device__ __forceinline__ const uint4* column() const {
    return words_ + operand_ * kWords + column_;
  }

  // Takes the operand of `keys`, which was folded as `next`, or folds it, and `next`, if that is
  // one. All warps call this with the same. `q` is the query of the KV head, [group, head_dim].
  __device__ __forceinline__ void take(const float* q, FoldKeys keys, FoldKeys next, int warp,
                                       int lane) {
    if (keys.set == next_set_) {
      operand_ += 1;
      next_set_ = FoldKeys::kNone;
    } else {
      // Two folds in turn: warps that are ahead write one while others still read the other.
      operand_ = (operand_ & 2) ^ 2;
      const int n_heads = next.set == FoldKeys::kNone ? group_ : 2 * group_;
#pragma unroll 1
      for (int n = warp; n < n_heads; n += decode_warps(kHeadDim)) {
        if (n < group_) {
          fold(q, n, keys, operand_, lane);
        } else {
          fold(q, n - group_, next, operand_ + 1, lane);
        }
      }
      next_set_ = next.set;
      __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      const int head = (lane & 3) * kLaneHeads + e;
      const float2 scalars = scalars_[operand_ * kMaxGroup + (head < group_ ? head : 0)];
      start[e] = scalars.x;
      inverse[e] = scalars.y;
    }
  }
  // What was folded is of another query.
  __device__ __forceinline__ void forget() { next_set_ = FoldKeys::kNone; }

 private:
  static constexpr int kWords = kHeadDim / 32 * kColumns;
  static constexpr int kLaneChannels = kHeadDim / kWarpLanes;  // of a head that a warp folds
  static constexpr int kPairs = kLaneChannels / 2;

  __device__ __forceinline__ void fold(const float* q, int head, FoldKeys keys, int operand,
                                       int lane) {
    const int at = lane * kLaneChannels, chunk = at / 32;
    uint32_t x[kPairs], s[kPairs], m[kPairs], rounded[kPairs];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {  // fp16 rows
      s[pair] = 0x3c003c00u;
      m[pair] = 0;
    }
    if (keys.set >= 0) {
      const HalfBits* scales = params_.key_sets + static_cast<int64_t>(keys.set) * 2 * kHeadDim;
      load_pairs(scales + at, s);
      load_pairs(scales + kHeadDim + at, m);
    }
    load_query(q + head * kHeadDim, keys, at, x);
    const float log2_scale = params_.scale * 1.44269504088896f;
    float folded[kLaneChannels], largest = 0, minimum = 0;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {  // its channels share their place
      const int of_8 = at % 8 / 2 + pair;
      const float factor =
          log2_scale * key_inverse_place(keys.cls.chunk_bits(chunk), of_8 >> 1, of_8 & 1);
      const float low = ptx::low_half(x[pair]), high = ptx::high_half(x[pair]);
      folded[pair * 2] = low * ptx::low_half(s[pair]) * factor;
      folded[pair * 2 + 1] = high * ptx::high_half(s[pair]) * factor;
      minimum += low * ptx::low_half(m[pair]) + high * ptx::high_half(m[pair]);
      largest = fmaxf(largest, fmaxf(fabsf(folded[pair * 2]), fabsf(folded[pair * 2 + 1])));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(ptx::kFullWarp, largest, offset));
      minimum += __shfl_xor_sync(ptx::kFullWarp, minimum, offset);
    }
    const int field = norm_field(largest);
    const float norm = __int_as_float(field << 23);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      rounded[pair] = ptx::pack_half2(folded[pair * 2] * norm, folded[pair * 2 + 1] * norm);
    }
    store_pairs(rounded, reinterpret_cast<uint32_t*>(words_ + operand * kWords + chunk * kColumns +
                                                     head * 4 + at % 32 / 8) +
                             at % 8 / 2);
    if (lane == 0) {
      const int unit = keys.set == FoldKeys::kTail ? 0 : kUnitField;  // of the products
      scalars_[operand * kMaxGroup + head] = {
          minimum * log2_scale * __int_as_float((field - unit) << 23),
          __int_as_float((254 - field + unit) << 23)};
    }
  }

  // The lane's channels of a row, rounded to fp16: as they stand, or those that the order of the
  // set names, by way of shared memory: one trip to memory, not two.
  __device__ __forceinline__ void load_query(const float* from, FoldKeys keys, int at,
                                             uint32_t (&pairs)[kPairs]) const {
    const bool in_order = keys.cls.wide_chunks == 0;
    int order[kLaneChannels];
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      order[c] =
          in_order ? 0
                   : __ldg(params_.key_orders + static_cast<int64_t>(keys.set) * kHeadDim + at + c);
    }
    float x[kLaneChannels];
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const float2 two = __ldg(reinterpret_cast<const float2*>(from + at) + pair);
      x[pair * 2] = two.x, x[pair * 2 + 1] = two.y;
    }
    if (!in_order) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        row_[at + c] = x[c];
      }
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        x[c] = row_[order[c]];
      }
      __syncwarp();
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      pairs[pair] = ptx::pack_half2(x[pair * 2], x[pair * 2 + 1]);
    }
  }

  __device__ __forceinline__ static void load_pairs(const HalfBits* from,
                                                    uint32_t (&pairs)[kPairs]) {
    if constexpr (kPairs == 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
      pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
    } else if constexpr (kPairs == 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      pairs[0] = v.x, pairs[1] = v.y;
    } else {
      pairs[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    }
  }
  __device__ __forceinline__ static void store_pairs(const uint32_t (&pairs)[kPairs],
                                                     uint32_t* to) {
    if constexpr (kPairs == 4) {
      *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    } else if constexpr (kPairs == 2) {
      *reinterpret_cast<uint2*>(to) = {pairs[0], pairs[1]};
    } else {
      *to = pairs[0];
    }
  }
  // norm = 2^k such that the largest operand is in [512, 1024): its exponent field is 127 + 9. It
  // and its inverse stay numbers in units of kSubnormalUnit, too.
  __device__ __forceinline__ static int norm_field(float largest) {
    const int field = __float_as_int(largest) >> 23;
    return largest > 0 ? min(max(127 + 127 + 9 - field, kUnitField + 1), 253) : 127;
  }
  static constexpr int kUnitField = 24;
  static_assert(kSubnormalUnit * (1 << kUnitField) == 1);

  const DecodeParams& params_;
  const int group_;
  uint4* words_;                    // [4 operands: of two folds, two each][head_dim / 32][kColumns]
  float2* scalars_;                 // [4 operands][heads]: start and inverse
  float* row_;                      // of this warp: a query head, in its own order
  int column_;                      // the lane's
  int operand_ = 2;                 // the one at hand
  int next_set_ = FoldKeys::kNone;  // what the other one of its fold is of
};

}  // namespace zipcache::cuda
