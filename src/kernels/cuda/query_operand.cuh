// The query as an operand of the matrix instruction, folded with the scales of the keys that it
// meets. See docs/device_format.md for the algebra.
#pragma once

#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/unpack.cuh"

namespace zipcache::cuda {

// Which keys a query is folded for: a scale set (index into DecodeParams::key_sets) and the widths
// of its pages, or the fp16 rows of the tail.
struct FoldKeys {
  int set = 0;
  PageClass cls;
  __device__ __forceinline__ bool is_tail() const { return cls.key_bits == kTailClass.key_bits; }
};

// Folds asked for together: of the query of a KV head, [group, head_dim], for what an item says.
struct FoldJob {
  const float* q;
  const WorkItem* item;
  int n_folds, first_set;
};

// The query as the operand of one width and scale set: q^ = scale * q * s / p, times a number
// `norm` per head. A warp folds all channels of a head, for several sets at a time; the block
// shares what its warps have folded.
//
// For codes q^ is an integer of 16 bits, in two parts: 256 * (part 0) + (part 1), each a byte with
// its sign. Groups up to 4 have a lane for each head: column 2c of the matrix instruction is part 0
// of head c, column 2c + 1 part 1. Larger groups have a column for each head and multiply twice.
// For the fp16 tail q^ is fp16; a lane of one head finds it in both of its columns. Columns beyond
// the group repeat its first head.
template <int kHeadDim, int kLaneHeads>
class QueryOperand {
  static constexpr int kLaneChannels = kHeadDim / kWarpLanes;  // of a head that a warp folds
  static constexpr int kPairs = kLaneChannels / 2;
  static constexpr int kOrderWords = (kLaneChannels + 3) / 4;

 public:
  static constexpr int kHalfColumns = query_columns(kLaneHeads);
  using Words = QueryWords<kLaneHeads>;  // as many products as a lane has heads

  float start[kLaneHeads];    // of the lane's heads: score * inverse + start is scale * q . k,
  float inverse[kLaneHeads];  // base 2

  // In shared memory: `words`, max_folds() operands of query_operand_bytes(), `scalars`, as many of
  // kQueryScalarBytes, and `row`, head_dim floats of this warp that are free while it folds.
  __device__ __forceinline__ QueryOperand(const DecodeParams& params, const DecodeSharedPlan& plan,
                                          uint8_t* words, uint8_t* scalars, float* row, int lane)
      : params_(params),
        group_(plan.group),
        group_inverse_(plan.group_inverse),
        words_(words),
        scalars_(reinterpret_cast<float2*>(scalars)),
        row_(row) {
    const int column = lane >> 2, head = column * kLaneHeads / kMaxLaneHeads;
    column_ = (head < group_ ? column : column % (kMaxLaneHeads / kLaneHeads)) * 4 + (lane & 3);
  }

  // This lane's column of [head_dim / 32][32 lanes], for codes.
  __device__ __forceinline__ const Words* column() const {
    return reinterpret_cast<const Words*>(words_ + operand_ * kBytes) + column_;
  }
  // Of [head_dim / 32][kHalfColumns], for fp16 rows: the operands of two k-steps.
  __device__ __forceinline__ const uint4* half_column() const {
    const int column = column_ / 4 * kLaneHeads / kMaxLaneHeads * 4 + column_ % 4;
    return reinterpret_cast<const uint4*>(words_ + operand_ * kBytes) + column;
  }

  // What a lane folds at a time: its channels of a head and of a scale set.
  struct Source {
    FoldKeys keys;
    float x[kLaneChannels];
    uint32_t s[kPairs], m[kPairs];
    uint32_t order[kOrderWords];  // a byte each
  };
  // Folding: all warps call both. The first asks for what a warp reads first; the other waits until
  // nobody reads what was folded before, and until all is folded.
  __device__ __forceinline__ Source begin_folds(const FoldJob& job, int warp, int lane) const {
    Source first{};
    if (warp < job.n_folds * group_) {
      first = load(job, warp, lane);
    }
    return first;
  }
  __device__ __forceinline__ void end_folds(const FoldJob& job, Source next, int warp, int lane) {
    __syncthreads();
    const int end = job.n_folds * group_;
#pragma unroll 1
    for (int n = warp; n < end; n += decode_warps(kHeadDim)) {
      const Source source = next;
      if (n + decode_warps(kHeadDim) < end) {  // on its way while this one is folded
        next = load(job, n + decode_warps(kHeadDim), lane);
      }
      fold(source, n, lane);
    }
    __syncthreads();
  }
  // The operand of fold `n` is the one at hand.
  __device__ __forceinline__ void take(int n, int lane) {
    operand_ = n;
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      const int head = (lane & 3) * kLaneHeads + e;
      const float2 scalars = scalars_[operand_ * kMaxGroup + (head < group_ ? head : 0)];
      start[e] = scalars.x;
      inverse[e] = scalars.y;
    }
  }

 private:
  static constexpr int kBytes = query_operand_bytes(kHeadDim, kLaneHeads);

  // `n`, here and below: the fold's number times the group, plus the head.
  __device__ __forceinline__ int fold_of(int n) const { return n * group_inverse_ >> 16; }
  __device__ __forceinline__ Source load(const FoldJob& job, int n, int lane) const {
    const int fold = fold_of(n), at = lane * kLaneChannels;
    const uint32_t named = __ldg(reinterpret_cast<const uint32_t*>(job.item->folds) + fold);
    Source source;
    source.keys = {job.first_set + static_cast<int>(named & 0xffff), item_class(named >> 16)};
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      source.s[pair] = 0x3c003c00u;  // fp16 rows
      source.m[pair] = 0;
      const float2 two = __ldg(
          reinterpret_cast<const float2*>(job.q + (n - fold * group_) * kHeadDim + at) + pair);
      source.x[pair * 2] = two.x, source.x[pair * 2 + 1] = two.y;
    }
    if (!source.keys.is_tail()) {
      const int64_t first = static_cast<int64_t>(source.keys.set) * kHeadDim + at;
      load_pairs(params_.key_sets + first * 2 - at, source.s);
      load_pairs(params_.key_sets + first * 2 - at + kHeadDim, source.m);
      if (source.keys.cls.wide_chunks > 0) {
        if constexpr (kLaneChannels == 2) {
          source.order[0] = __ldg(reinterpret_cast<const uint16_t*>(params_.key_orders + first));
        } else {
#pragma unroll
          for (int word = 0; word < kOrderWords; ++word) {
            source.order[word] =
                __ldg(reinterpret_cast<const uint32_t*>(params_.key_orders + first) + word);
          }
        }
      }
    }
    return source;
  }
  __device__ __forceinline__ void fold(const Source& source, int n, int lane) {
    const int at = lane * kLaneChannels, chunk = at / 32;
    const int operand = fold_of(n), head = n - operand * group_;
    const FoldKeys& keys = source.keys;
    const uint32_t(&s)[kPairs] = source.s;
    const uint32_t(&m)[kPairs] = source.m;
    uint32_t x[kPairs];
    round_query(source, at, x);
    const float log2_scale = params_.scale * 1.44269504088896f;
    float folded[kLaneChannels], largest = 0, minimum = 0;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {  // its channels share their place
      const int upper = (at % 8 + pair * 2) / 4;
      const float factor = log2_scale * key_inverse_place(keys.cls.chunk_bits(chunk), upper);
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
    uint8_t* const to = words_ + operand * kBytes + chunk * kChunkBytes;
    float norm, inverse;
    if (keys.is_tail()) {
      const int field = norm_field(largest);
      norm = __int_as_float(field << 23), inverse = __int_as_float((254 - field) << 23);
      uint32_t rounded[kPairs];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        rounded[pair] = ptx::pack_half2(folded[pair * 2] * norm, folded[pair * 2 + 1] * norm);
      }
      store_words(rounded, to + (head * 4 + at % 32 / 8) * 16 + at % 8 * 2);
    } else {
      norm = largest > 0 ? kLargestOperand * ptx::reciprocal(largest) : 0.0f;
      inverse = largest > 0 ? fmaxf(largest, 1e-30f) * (1.0f / kLargestOperand) : 1.0f;
      store_parts(folded, norm, head, at % 32, to);
    }
    if (lane == 0) {
      scalars_[operand * kMaxGroup + head] = {minimum * log2_scale, inverse};
    }
  }

  // Channels `at` on (of 32) as bytes: of the low parts (signed) and, what they leave, the high
  // ones.
  __device__ __forceinline__ static void store_parts(const float (&folded)[kLaneChannels],
                                                     float norm, int head, int at, uint8_t* to) {
    constexpr int kOtherPart = kLaneHeads == 1 ? 4 * sizeof(Words) : sizeof(uint2);
    uint32_t high[(kLaneChannels + 3) / 4] = {}, low[(kLaneChannels + 3) / 4] = {};
#pragma unroll
    for (int c = 0; c < kLaneChannels; ++c) {
      const int whole = __float2int_rn(folded[c] * norm);
      high[c / 4] |= ((whole + 128) >> 8 & 0xff) << c % 4 * 8;
      low[c / 4] |= (whole & 0xff) << c % 4 * 8;
    }
    const int column = head * (kMaxLaneHeads / kLaneHeads) * 4 + at / 8;
    uint8_t* const of_column = to + column * static_cast<int>(sizeof(Words)) + at % 8;
    store_bytes(high, of_column);
    store_bytes(low, of_column + kOtherPart);
  }
  template <int kWords>
  __device__ __forceinline__ static void store_bytes(const uint32_t (&words)[kWords], uint8_t* to) {
    if constexpr (kLaneChannels == 2) {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
    } else {
      store_words(words, to);
    }
  }

  // The lane's channels of a row, rounded to fp16: as they stand, or those that the order of the
  // set names, by way of shared memory: one trip to memory, not two.
  __device__ __forceinline__ void round_query(const Source& source, int at,
                                              uint32_t (&pairs)[kPairs]) const {
    float x[kLaneChannels];
    if (source.keys.cls.wide_chunks == 0) {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        x[c] = source.x[c];
      }
    } else {
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        row_[at + c] = source.x[c];
      }
      __syncwarp();
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c) {
        x[c] = row_[source.order[c / 4] >> c % 4 * 8 & 0xff];
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
  template <int kWords>
  __device__ __forceinline__ static void store_words(const uint32_t (&words)[kWords], uint8_t* to) {
    if constexpr (kWords == 4) {
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
  }
  // norm = 2^k such that the largest operand is in [512, 1024): its exponent field is 127 + 9.
  __device__ __forceinline__ static int norm_field(float largest) {
    const int field = __float_as_int(largest) >> 23;
    return largest > 0 ? min(max(127 + 127 + 9 - field, 1), 253) : 127;
  }
  // 127 * 256 + 127: the largest that has two parts. A sum of 256 such times 255 is below 2^31.
  static constexpr float kLargestOperand = 32639;
  static constexpr int kChunkBytes = kHalfColumns * 16;
  static_assert(kChunkBytes == kWarpLanes * static_cast<int>(sizeof(Words)));

  const DecodeParams& params_;
  const int group_, group_inverse_;
  uint8_t* words_;   // [operands]
  float2* scalars_;  // [operands][heads]: start and inverse
  float* row_;       // of this warp: a query head, in its own order
  int column_;       // the lane's
  int operand_ = 0;  // the one at hand
};

}  // namespace zipcache::cuda
