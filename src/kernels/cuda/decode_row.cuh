// One warp's running attention of the query heads of one KV head: scores of a tile of 32 tokens,
// the online softmax, the weighted sum of values. See docs/device_format.md for the algebra.
//
// Matrix shapes: tokens are the rows and query heads the columns of the scores; channels are the
// rows and query heads the columns of the output. So lane (g, i) has columns 2i and 2i+1 in both,
// of tokens g + 8 * k and of the channels that value_position() gives it: heads 2i and 2i+1, or
// head i twice (QueryOperand), of which only the first is looked at.
#pragma once

#include <type_traits>

#include "kernels/cuda/params.h"
#include "kernels/cuda/query_operand.cuh"
#include "kernels/cuda/unpack.cuh"

namespace zipcache::cuda {

// The maximum that weights refer to grows only when a score exceeds it by this much (log2). Weights
// stay below 2^5, and p * s in fp16's range: packers keep s to 127, which may stand times 16.
inline constexpr float kRescaleThreshold = 5.0f;
inline constexpr float kNoScore = -1e30f;  // a finite "no maximum yet": no NaN from inf - inf

template <int kBits>
using Width = std::integral_constant<int, kBits>;
// Calls `multiply` with this width as a constant. By comparing sizes: of a switch the compiler
// makes a jump table, which waits for its load.
template <typename Multiply>
__device__ __forceinline__ void with_width(int bits, Multiply multiply) {
  if (bits < 3) {
    multiply(Width<2>());
  } else if (bits < 4) {
    multiply(Width<3>());
  } else if (bits < 8) {
    multiply(Width<4>());
  } else {
    multiply(Width<8>());
  }
}

// What the tiles of an item are made of, unpacked once: what is derived from the item's bits inside
// the loop is derived again for every tile.
struct TileShape {
  int key_bits;  // or kWideKeys
  int wide_chunks, value_bits;
  int value_offset, param_offset;  // bytes from the start of a tile

  static constexpr int kWideKeys = 0;
  __device__ __forceinline__ TileShape(PageClass cls, int value_start, int tile_bytes)
      : key_bits(ptx::opaque(cls.wide_chunks > 0 ? kWideKeys : cls.key_bits)),
        wide_chunks(cls.wide_chunks),
        value_bits(ptx::opaque(cls.value_bits)),
        value_offset(value_start),
        param_offset(tile_bytes - kTileParamBytes) {}
};

template <int kHeadDim, int kLaneHeads>
struct RowState {
  static constexpr int kBlocks = kHeadDim / 16;
  using Query = QueryOperand<kHeadDim, kLaneHeads>;

  float acc[kBlocks][4];  // sums of p * s * v, in the units of the value width at hand
  float side[4];          // row 0: sum of p * s * z, of the same rounded p * s
  float max[kLaneHeads];  // what the weights of the lane's heads refer to
  float sum[kLaneHeads];  // of unrounded weights, this lane's tokens only

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      acc[block][0] = acc[block][1] = acc[block][2] = acc[block][3] = 0;
    }
    side[0] = side[1] = side[2] = side[3] = 0;
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      max[e] = kNoScore;
      sum[e] = 0;
    }
  }

  // Raises the maxima to those of the whole warp and rescales what was summed so far.
  __device__ __forceinline__ void raise_max(float (&largest)[kLaneHeads]) {
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      largest[e] = fmaxf(largest[e], __shfl_xor_sync(ptx::kFullWarp, largest[e], 4));
      largest[e] = fmaxf(largest[e], __shfl_xor_sync(ptx::kFullWarp, largest[e], 8));
      largest[e] = fmaxf(largest[e], __shfl_xor_sync(ptx::kFullWarp, largest[e], 16));
      largest[e] = fmaxf(largest[e], max[e]);
      const float factor = ptx::exp2(max[e] - largest[e]);
      max[e] = largest[e];
      sum[e] *= factor;
      side[e] *= factor;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        acc[block][e] *= factor, acc[block][2 + e] *= factor;
      }
    }
  }

  // Scores, in the units of q, to weights p in place; adds them up.
  __device__ __forceinline__ void softmax(float (&s)[2][4], const Query& q, int tokens, int lane) {
    if (tokens < kTileTokens) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        if (part * 8 + (lane >> 2) >= tokens) {
          s[part / 2][part % 2 * 2] = s[part / 2][part % 2 * 2 + 1] = -INFINITY;
        }
      }
    }
    float largest[kLaneHeads];
    bool exceeds = false;
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      largest[e] = fmaxf(fmaxf(s[0][e], s[0][2 + e]), fmaxf(s[1][e], s[1][2 + e]));
      largest[e] = fmaf(largest[e], q.inverse[e], q.start[e]);
      exceeds |= largest[e] > max[e] + kRescaleThreshold;
    }
    if (__any_sync(ptx::kFullWarp, exceeds)) {
      raise_max(largest);
    }
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      const float offset = q.start[e] - max[e];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float& score = s[part / 2][part % 2 * 2 + e];
        score = ptx::exp2(fmaf(score, q.inverse[e], offset));
        sum[e] += score;
      }
    }
  }

  // acc from the units of width `from` to those of `to`, 0 bits: plain sums of p * s * (v - z).
  // `side` starts anew. One operation per sum.
  __device__ __forceinline__ void change_width(int from, int to, int lane) {
    if (from == 0) {
      return;  // nothing summed yet
    }
#pragma unroll
    for (int e = 0; e < kLaneHeads; ++e) {
      const float zeros = __shfl_sync(ptx::kFullWarp, side[e], lane & 3);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float unit = to == 0 ? 1.0f : value_place(to, row) * kSubnormalUnit;
        const float scale = unit * (1.0f / kSubnormalUnit) * (1.0f / value_place(from, row));
        const float offset = zeros * unit;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          float& a = acc[block][row * 2 + e];
          a = fmaf(a, scale, -offset);
        }
      }
      side[e] = 0;
    }
  }

  // Channel factors: acc becomes sums of p * value.
  __device__ __forceinline__ void apply_factors(const float* factors, int lane) {
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      const float4* from = reinterpret_cast<const float4*>(factors + part * 64 + (lane >> 2) * 8);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float4 f = __ldg(from + pair);
        float(&a)[4] = acc[part * 4 + pair * 2];
        float(&b)[4] = acc[part * 4 + pair * 2 + 1];
#pragma unroll
        for (int e = 0; e < kLaneHeads; ++e) {
          a[e] *= f.x, a[2 + e] *= f.y, b[e] *= f.z, b[2 + e] *= f.w;
        }
      }
    }
  }

  // Weights, rounded to fp16 after `scales` of the lane's four tokens, as operands.
  __device__ __forceinline__ static void make_operand(const float (&p)[2][4],
                                                      const float (&scales)[4],
                                                      uint32_t (&operand)[2][2]) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const float low = p[part / 2][part % 2 * 2] * scales[part];
      const float high = kLaneHeads == 1 ? low : p[part / 2][part % 2 * 2 + 1] * scales[part];
      operand[part / 2][part % 2] = ptx::transpose_8x8(ptx::pack_half2(low, high));
    }
  }

  // One tile of codes in shared memory.
  __device__ __forceinline__ void add_tile(const uint8_t* tile, const TileShape& shape, int tokens,
                                           const Query& q, int lane) {
    int sums[kLaneHeads][2][4] = {};
    if (shape.key_bits == TileShape::kWideKeys) {
      multiply_wide_keys<kHeadDim, kLaneHeads>(tile, shape.wide_chunks, lane, q.column(), sums);
    } else {
      with_width(shape.key_bits, [&](auto bits) {
        multiply_keys<kHeadDim, bits(), kLaneHeads>(tile, lane, q.column(), sums);
      });
    }
    // The parts of a product: in two columns of a lane, or of two multiplications.
    float s[2][4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int block = part / 2;
#pragma unroll
      for (int e = 0; e < kLaneHeads; ++e) {
        const int at = part % 2 * 2 + e;
        const int low = kLaneHeads == 1 ? sums[0][block][at + 1] : sums[kLaneHeads - 1][block][at];
        s[block][at] = static_cast<float>(sums[0][block][at] * 256 + low);
      }
    }
    softmax(s, q, tokens, lane);

    const uint8_t* codes = tile + shape.value_offset;
    const HalfBits* params = reinterpret_cast<const HalfBits*>(tile + shape.param_offset);
    const uint2 s_pairs = *reinterpret_cast<const uint2*>(params + scale_index(lane >> 2));
    const uint4 z_pairs = *reinterpret_cast<const uint4*>(params + zero_index((lane & 3) * 2));
    const float scales[4] = {ptx::low_half(s_pairs.x), ptx::high_half(s_pairs.x),
                             ptx::low_half(s_pairs.y), ptx::high_half(s_pairs.y)};
    uint32_t operand[2][2];
    make_operand(s, scales, operand);

    // One more "channel", z, gives the sum that the zeros need.
    const uint32_t keep = lane >> 2 == 0 ? 0xffffffffu : 0u;
    ptx::mma_16x8x16(side, {z_pairs.x & keep, 0, z_pairs.y & keep, 0}, operand[0][0],
                     operand[0][1]);
    ptx::mma_16x8x16(side, {z_pairs.z & keep, 0, z_pairs.w & keep, 0}, operand[1][0],
                     operand[1][1]);

    with_width(shape.value_bits,
               [&](auto bits) { multiply_values<kHeadDim, bits()>(codes, lane, operand, acc); });
  }

  // `tokens` (1..32) of the fp16 tail. REQUIRES: apply_factors() was
  // called.
  __device__ __forceinline__ void add_tail(const HalfBits* k, const HalfBits* v, int tokens,
                                           const Query& q, int lane) {
    const int g = lane >> 2, i = lane & 3;
    const auto row = [&](const HalfBits* base, int token, int channel) {
      const uint32_t offset = min(token, tokens - 1) * kHeadDim + channel;  // 32 bits: no spills
      return ptx::load_written_16(base + offset);
    };
    float s[2][4] = {};
#pragma unroll 1  // here and below: the loads of a whole tile at once would spill
    for (int block = 0; block * 16 < tokens; ++block) {
      float part[4] = {};
#pragma unroll 4
      for (int chunk = 0; chunk < kHeadDim / 32; ++chunk) {
        const uint4 upper = row(k, block * 16 + g, chunk * 32 + i * 8);
        const uint4 lower = row(k, block * 16 + g + 8, chunk * 32 + i * 8);
        const uint4 b = q.half_column()[chunk * Query::kHalfColumns];
        ptx::mma_16x8x16(part, {upper.x, lower.x, upper.y, lower.y}, b.x, b.y);
        ptx::mma_16x8x16(part, {upper.z, lower.z, upper.w, lower.w}, b.z, b.w);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        s[0][n] = block == 0 ? part[n] : s[0][n];
        s[1][n] = block == 1 ? part[n] : s[1][n];
      }
    }
    softmax(s, q, tokens, lane);
    const float scales[4] = {1, 1, 1, 1};
    uint32_t operand[2][2];
    make_operand(s, scales, operand);
#pragma unroll 1
    for (int step = 0; step * 16 < tokens; ++step) {
      const uint32_t p0 = step == 0 ? operand[0][0] : operand[1][0];
      const uint32_t p1 = step == 0 ? operand[0][1] : operand[1][1];
#pragma unroll
      for (int part = 0; part < kHeadDim / 64; ++part) {
        uint32_t pairs[4][4];  // [token 2i, 2i+1, 2i+8, 2i+9][channel pair]
#pragma unroll
        for (int token = 0; token < 4; ++token) {
          const uint4 x = row(v, step * 16 + token / 2 * 8 + i * 2 + token % 2, part * 64 + g * 8);
          pairs[token][0] = x.x, pairs[token][1] = x.y, pairs[token][2] = x.z,
          pairs[token][3] = x.w;
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          ptx::mma_16x8x16(acc[part * 4 + pair],
                           {__byte_perm(pairs[0][pair], pairs[1][pair], 0x5410),
                            __byte_perm(pairs[0][pair], pairs[1][pair], 0x7632),
                            __byte_perm(pairs[2][pair], pairs[3][pair], 0x5410),
                            __byte_perm(pairs[2][pair], pairs[3][pair], 0x7632)},
                           p0, p1);
        }
      }
    }
  }
};

}  // namespace zipcache::cuda
