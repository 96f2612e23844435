// From the words of a device page to operands of the matrix instruction.
//
// A code k becomes an fp16 number by masking it out where it is, in the mantissa: one logic
// operation, no conversion. Either as it comes, a subnormal number, k * p * 2^-24, where p = 2^(its
// lowest bit): the matrix instruction takes these, and nothing has to be subtracted. Or with the
// exponent of 1024 put in, 1024 + k * p, for arithmetic on pairs of fp16 numbers. p depends on
// where the code lies; registers that share a channel share it. Nothing here divides by it: the
// callers fold it into the other operand or the sum.
#pragma once

#include "kernels/cuda/device_page.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {

// What codes become: the exponents that are put in, for two halves.
enum class CodeBase : uint32_t { kSubnormal = 0, k1024 = 0x64006400 };
inline constexpr float kSubnormalUnit = 1.0f / (1 << 24);

template <CodeBase kBase>
__device__ __forceinline__ uint32_t masked(uint32_t x, uint32_t mask) {
  if constexpr (kBase == CodeBase::kSubnormal) {
    return x & mask;
  } else {
    return ptx::and_or(x, mask, static_cast<uint32_t>(kBase));
  }
}

// 1 / p of a key channel: `odd_step`, `upper` as in key_position(). bits 16: plain fp16 rows.
__device__ __forceinline__ float key_inverse_place(int bits, int odd_step, int upper) {
  const float of_upper = bits == 2 ? 0.25f : bits <= 4 ? 0.0625f : 1.0f;
  const float of_step = bits == 2 ? 0.0625f : 1.0f;
  return (odd_step != 0 ? of_step : 1.0f) * (upper != 0 ? of_upper : 1.0f);
}

// p of a value channel of this row parity.
__device__ __forceinline__ float value_place(int bits, int row) {
  return row != 0 ? 1.0f : bits == 2 ? 4.0f : bits <= 4 ? 16.0f : 1.0f;
}

// Two 4-bit words (k-steps even, odd) out of a word of the low plane and the shifted high bits. The
// top bit of every nibble is junk.
__device__ __forceinline__ void merge_planes(uint32_t low, uint32_t high_even, uint32_t high_odd,
                                             uint32_t (&words)[2]) {
  words[0] = (low & 0x33333333u) | (high_even & 0xccccccccu);
  words[1] = ((low >> 2) & 0x33333333u) | (high_odd & 0xccccccccu);
}

// --- Keys: operands of two k-steps (even, odd) of one 16-token block -----------------------------

template <CodeBase kBase>
__device__ __forceinline__ void unpack_key_2(uint32_t w, uint32_t (&even)[4], uint32_t (&odd)[4]) {
  const uint32_t t = w >> 8;
  even[0] = masked<kBase>(w, 0x00030003u);
  even[2] = masked<kBase>(w, 0x000c000cu);
  odd[0] = masked<kBase>(w, 0x00300030u);
  odd[2] = masked<kBase>(w, 0x00c000c0u);
  even[1] = masked<kBase>(t, 0x00030003u);
  even[3] = masked<kBase>(t, 0x000c000cu);
  odd[1] = masked<kBase>(t, 0x00300030u);
  odd[3] = masked<kBase>(t, 0x00c000c0u);
}

// One k-step of 4-bit (kMask 0xf) or of merged 3-bit (kMask 0x7) codes.
template <CodeBase kBase, uint32_t kMask>
__device__ __forceinline__ void unpack_key_nibbles(uint32_t w, uint32_t (&a)[4]) {
  constexpr uint32_t kPair = kMask * 0x00010001u;
  const uint32_t t = w >> 8;
  a[0] = masked<kBase>(w, kPair);
  a[2] = masked<kBase>(w, kPair << 4);
  a[1] = masked<kBase>(t, kPair);
  a[3] = masked<kBase>(t, kPair << 4);
}

// Of 8-bit keys, or of 8-bit values of one 16-token step.
template <CodeBase kBase>
__device__ __forceinline__ void unpack_bytes(uint32_t row0, uint32_t row1, uint32_t (&a)[4]) {
  a[0] = masked<kBase>(row0, 0x00ff00ffu);
  a[2] = masked<kBase>(row0 >> 8, 0x00ff00ffu);
  a[1] = masked<kBase>(row1, 0x00ff00ffu);
  a[3] = masked<kBase>(row1 >> 8, 0x00ff00ffu);
}

// --- Values: operands of one 16-channel block ----------------------------------------------------

// Both 16-token steps.
template <CodeBase kBase>
__device__ __forceinline__ void unpack_value_2(uint32_t w, uint32_t (&step0)[4],
                                               uint32_t (&step1)[4]) {
  const uint32_t t1 = w >> 4, t2 = w >> 8, t3 = w >> 12;
  step0[0] = masked<kBase>(w, 0x000c000cu);
  step0[1] = masked<kBase>(w, 0x00030003u);
  step0[2] = masked<kBase>(t1, 0x000c000cu);
  step0[3] = masked<kBase>(t1, 0x00030003u);
  step1[0] = masked<kBase>(t2, 0x000c000cu);
  step1[1] = masked<kBase>(t2, 0x00030003u);
  step1[2] = masked<kBase>(t3, 0x000c000cu);
  step1[3] = masked<kBase>(t3, 0x00030003u);
}

template <CodeBase kBase, uint32_t kMask>
__device__ __forceinline__ void unpack_value_nibbles(uint32_t w, uint32_t (&a)[4]) {
  constexpr uint32_t kPair = kMask * 0x00010001u;
  const uint32_t t = w >> 8;
  a[0] = masked<kBase>(w, kPair << 4);
  a[1] = masked<kBase>(w, kPair);
  a[2] = masked<kBase>(t, kPair << 4);
  a[3] = masked<kBase>(t, kPair);
}

// --- Words of a lane -----------------------------------------------------------------------------

// Words [first, first + kCount) of this lane; kCount is 2 or 4 and a multiple of what lies side by
// side (chunk_words()).
template <int kHeadDim, int kPlaneBits, int kCount>
__device__ __forceinline__ void load_words(const uint8_t* plane, int lane, int first,
                                           uint32_t (&words)[kCount]) {
  static_assert(chunk_words(kHeadDim, kPlaneBits) == kCount);
  const uint8_t* at = plane + word_offset(kHeadDim, kPlaneBits, lane, first);
  if constexpr (kCount == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(at);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(at);
    words[0] = v.x, words[1] = v.y;
  }
}

// --- A tile's scores and its share of the output -------------------------------------------------

// s[block] += keys of a 16-token block x query operands, for both blocks of a tile, in units of
// kSubnormalUnit. q is the lane's column of [head_dim / 32][kColumns]: the operands of two k-steps.
// kHeadDim: of the matrix.
template <int kHeadDim, int kBits, int kColumns>
__device__ __forceinline__ void multiply_keys(const uint8_t* codes, int lane, const uint4* q,
                                              float (&s)[2][4]) {
  constexpr CodeBase kBase = CodeBase::kSubnormal;
  constexpr int kChunks = kHeadDim / 32;  // two k-steps each
  constexpr int kHighWords = chunk_words(kHeadDim, 1), kLowWords = chunk_words(kHeadDim, 2);
  uint32_t w[kBits <= 3 ? kLowWords : 4], wide[4], high[kHighWords], even[4], odd[4];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint4 query = q[c * kColumns];
    if constexpr (kBits == 3) {
      if (c % kHighWords == 0) {
        load_words<kHeadDim, 1>(codes + tile_code_bytes(kHeadDim, 2), lane, c, high);
      }
    }
    if constexpr (kBits <= 3) {
      if (c * 2 % kLowWords == 0) {
        load_words<kHeadDim, 2>(codes, lane, c * 2, w);
      }
    } else if constexpr (kBits == 4) {
      load_words<kHeadDim, 4>(codes, lane, c * 4, w);
    } else {
      load_words<kHeadDim, 8>(codes, lane, c * 8, w);
      load_words<kHeadDim, 8>(codes, lane, c * 8 + 4, wide);
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      if constexpr (kBits == 2) {
        unpack_key_2<kBase>(w[c * 2 % kLowWords + block], even, odd);
      } else if constexpr (kBits == 3) {
        const uint32_t h = high[c % kHighWords];
        uint32_t nibbles[2];
        merge_planes(w[c * 2 % kLowWords + block], block == 0 ? h : h << 2,
                     block == 0 ? h >> 1 : h << 1, nibbles);
        unpack_key_nibbles<kBase, 7>(nibbles[0], even);
        unpack_key_nibbles<kBase, 7>(nibbles[1], odd);
      } else if constexpr (kBits == 4) {
        unpack_key_nibbles<kBase, 15>(w[block], even);
        unpack_key_nibbles<kBase, 15>(w[2 + block], odd);
      } else {
        unpack_bytes<kBase>(w[block * 2], w[block * 2 + 1], even);
        unpack_bytes<kBase>(wide[block * 2], wide[block * 2 + 1], odd);
      }
      ptx::mma_16x8x16(s[block], even, query.x, query.y);
      ptx::mma_16x8x16(s[block], odd, query.z, query.w);
    }
  }
}

// The same of a page with `n_wide` chunks of wide channels: a matrix of its own for each chunk.
template <int kHeadDim, int kColumns>
__device__ __forceinline__ void multiply_wide_keys(const uint8_t* codes, int n_wide, int lane,
                                                   const uint4* q, float (&s)[2][4]) {
  constexpr int kChunks = kHeadDim / kChunkChannels;
  constexpr int kWideBytes = tile_code_bytes(kChunkChannels, kWideBits);
  constexpr int kOtherBytes = tile_code_bytes(kChunkChannels, kBitsBesideWide);
  const auto multiply_wide = [&](int chunk) {
    multiply_keys<kChunkChannels, kWideBits, kColumns>(codes + chunk * kWideBytes, lane,
                                                       q + chunk * kColumns, s);
  };
  const auto multiply_other = [&](int chunk, int of_wide) {
    multiply_keys<kChunkChannels, kBitsBesideWide, kColumns>(
        codes + of_wide * kWideBytes + (chunk - of_wide) * kOtherBytes, lane, q + chunk * kColumns,
        s);
  };
  if (n_wide == kChunks / 2) {  // the default: no loops
#pragma unroll
    for (int chunk = 0; chunk < kChunks / 2; ++chunk) {
      multiply_wide(chunk);
    }
#pragma unroll
    for (int chunk = kChunks / 2; chunk < kChunks; ++chunk) {
      multiply_other(chunk, kChunks / 2);
    }
    return;
  }
  if constexpr (kChunks > 2) {  // of 2 chunks, one is wide
#pragma unroll 1
    for (int chunk = 0; chunk < n_wide; ++chunk) {
      multiply_wide(chunk);
    }
#pragma unroll 1
    for (int chunk = n_wide; chunk < kChunks; ++chunk) {
      multiply_other(chunk, n_wide);
    }
  }
}

// acc[block] += values of a 16-channel block x probability operands p[step], in units of
// kSubnormalUnit * value_place().
template <int kHeadDim, int kBits>
__device__ __forceinline__ void multiply_values(const uint8_t* codes, int lane,
                                                const uint32_t (&p)[2][2],
                                                float (&acc)[kHeadDim / 16][4]) {
  constexpr CodeBase kBase = CodeBase::kSubnormal;
  constexpr int kBlocks = kHeadDim / 16;
  constexpr int kHighWords = chunk_words(kHeadDim, 1);
  uint32_t w[4], high[kHighWords], step0[4], step1[4];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    if constexpr (kBits == 3) {
      if (block % (2 * kHighWords) == 0) {
        load_words<kHeadDim, 1>(codes + tile_code_bytes(kHeadDim, 2), lane, block / 2, high);
      }
    }
    if constexpr (kBits <= 3) {
      if (block % 4 == 0) {
        load_words<kHeadDim, 2>(codes, lane, block, w);
      }
    } else if constexpr (kBits == 4) {
      if (block % 2 == 0) {
        load_words<kHeadDim, 4>(codes, lane, block * 2, w);
      }
    } else {
      load_words<kHeadDim, 8>(codes, lane, block * 4, w);
    }
    if constexpr (kBits == 2) {
      unpack_value_2<kBase>(w[block % 4], step0, step1);
    } else if constexpr (kBits == 3) {
      const uint32_t h = high[block / 2 % kHighWords];
      uint32_t nibbles[2];
      merge_planes(w[block % 4], block % 2 == 0 ? h : h << 2, block % 2 == 0 ? h >> 1 : h << 1,
                   nibbles);
      unpack_value_nibbles<kBase, 7>(nibbles[0], step0);
      unpack_value_nibbles<kBase, 7>(nibbles[1], step1);
    } else if constexpr (kBits == 4) {
      unpack_value_nibbles<kBase, 15>(w[block % 2 * 2], step0);
      unpack_value_nibbles<kBase, 15>(w[block % 2 * 2 + 1], step1);
    } else {
      unpack_bytes<kBase>(w[0], w[1], step0);
      unpack_bytes<kBase>(w[2], w[3], step1);
    }
    ptx::mma_16x8x16(acc[block], step0, p[0][0], p[0][1]);
    ptx::mma_16x8x16(acc[block], step1, p[1][0], p[1][1]);
  }
}

}  // namespace zipcache::cuda
