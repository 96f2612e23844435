// From the words of a device page to operands of the matrix instructions.
//
// Keys stay bytes: a mask leaves four codes of one token, times p where they are not at the bottom
// of their bytes. The query comes as bytes too (QueryOperand), and sums are exact.
//
// A code of a value becomes an fp16 number by masking it out where it is, in the mantissa: a
// subnormal number, code * p * 2^-24, where p = 2^(its lowest bit). The matrix instruction takes
// these, and nothing has to be subtracted. For arithmetic on pairs of fp16 numbers the exponent of
// 1024 is put in: 1024 + code * p. Registers that share a channel share p. Nothing here divides by
// it: the callers fold it into the other operand or the sum.
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

// 1 / p of a key channel: `upper` as in key_position(). Of the fp16 tail 1.
__device__ __forceinline__ float key_inverse_place(int bits, int upper) {
  return upper != 0 && bits <= 3 ? 0.25f : 1.0f;
}

// p of a value channel of this row parity, with the parameters of tokens as they stand.
__device__ __forceinline__ float value_place(int bits, int row) {
  return bits == 2 ? (row != 0 ? 16.0f : 64.0f) : bits <= 4 && row == 0 ? 16.0f : 1.0f;
}

// Two 4-bit words (k-steps even, odd) out of a word of the low plane and the shifted high bits. The
// top bit of every nibble is junk.
__device__ __forceinline__ void merge_planes(uint32_t low, uint32_t high_even, uint32_t high_odd,
                                             uint32_t (&words)[2]) {
  words[0] = (low & 0x33333333u) | (high_even & 0xccccccccu);
  words[1] = ((low >> 2) & 0x33333333u) | (high_odd & 0xccccccccu);
}

// --- Keys: the operand of a 16-token block and 32 channels ---------------------------------------

__device__ __forceinline__ void unpack_keys_2(uint32_t w, uint32_t (&a)[4]) {
  const uint32_t t = w >> 4;
  a[0] = w & 0x03030303u;
  a[1] = t & 0x03030303u;
  a[2] = w & 0x0c0c0c0cu;
  a[3] = t & 0x0c0c0c0cu;
}

// The same with the upper row, a[1] and a[3], times 16.
__device__ __forceinline__ void unpack_keys_2_in_place(uint32_t w, uint32_t (&a)[4]) {
  a[0] = w & 0x03030303u;
  a[1] = w & 0x30303030u;
  a[2] = w & 0x0c0c0c0cu;
  a[3] = w & 0xc0c0c0c0u;
}

// `high`: the word of the 1-bit plane, of both blocks.
__device__ __forceinline__ void unpack_keys_3(uint32_t w, uint32_t high, int block,
                                              uint32_t (&a)[4]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int n = block * 2 + row;
    const uint32_t low = w >> 4 * row;
    const uint32_t of_lower = n < 2 ? high >> n : high << (n - 1);
    a[row] = (low & 0x03030303u) | (of_lower & 0x04040404u);
    a[2 + row] = (low & 0x0c0c0c0cu) | (high >> n & 0x10101010u);
  }
}

__device__ __forceinline__ void unpack_keys_4(uint32_t row0, uint32_t row1, uint32_t (&a)[4]) {
  a[0] = row0 & 0x0f0f0f0fu;
  a[1] = row1 & 0x0f0f0f0fu;
  a[2] = row0 >> 4 & 0x0f0f0f0fu;
  a[3] = row1 >> 4 & 0x0f0f0f0fu;
}

// `w`: the lane's words of the chunk, `high` of the 1-bit plane.
template <int kBits, int kWords>
__device__ __forceinline__ void unpack_keys(const uint32_t (&w)[kWords], uint32_t high, int block,
                                            uint32_t (&a)[4]) {
  static_assert(kWords == (kBits == 3 ? 2 : kBits));
  if constexpr (kBits == 2) {
    unpack_keys_2(w[block], a);
  } else if constexpr (kBits == 3) {
    unpack_keys_3(w[block], high, block, a);
  } else if constexpr (kBits == 4) {
    unpack_keys_4(w[block * 2], w[block * 2 + 1], a);
  } else {
    a[0] = w[block * 4], a[2] = w[block * 4 + 1];
    a[1] = w[block * 4 + 2], a[3] = w[block * 4 + 3];
  }
}

// --- Values: operands of one 16-channel block ----------------------------------------------------

// Of 8-bit values of one 16-token step.
template <CodeBase kBase>
__device__ __forceinline__ void unpack_value_8(uint32_t row0, uint32_t row1, uint32_t (&a)[4]) {
  a[0] = masked<kBase>(row0, 0x00ff00ffu);
  a[2] = masked<kBase>(row0 >> 8, 0x00ff00ffu);
  a[1] = masked<kBase>(row1, 0x00ff00ffu);
  a[3] = masked<kBase>(row1 >> 8, 0x00ff00ffu);
}

// Both 16-token steps.
template <CodeBase kBase>
__device__ __forceinline__ void unpack_value_2(uint32_t w, uint32_t (&step0)[4],
                                               uint32_t (&step1)[4]) {
  const uint32_t t = w >> 8;
  step0[0] = masked<kBase>(w, 0x000c000cu);
  step0[1] = masked<kBase>(w, 0x00030003u);
  step0[2] = masked<kBase>(t, 0x000c000cu);
  step0[3] = masked<kBase>(t, 0x00030003u);
  step1[0] = masked<kBase>(w, 0x00c000c0u);
  step1[1] = masked<kBase>(w, 0x00300030u);
  step1[2] = masked<kBase>(t, 0x00c000c0u);
  step1[3] = masked<kBase>(t, 0x00300030u);
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

// What a lane reads of a query operand for 32 channels: of one head in two columns, or of a column
// that has both parts.
template <int kParts>
struct QueryWords;
template <>
struct QueryWords<1> {
  uint2 part;
};
template <>
struct QueryWords<2> {
  uint2 part, other_part;
};

// sums[part][block] += keys of a 16-token block x query operand, for both blocks of a tile. q is
// the lane's column of [head_dim / 32][32 lanes]. kHeadDim: of the matrix. The upper rows of 2-bit
// codes are shifted once in the sums, which are theirs alone, instead of in every word.
template <int kHeadDim, int kBits, int kParts>
__device__ __forceinline__ void multiply_keys(const uint8_t* codes, int lane,
                                              const QueryWords<kParts>* q,
                                              int (&sums)[kParts][2][4]) {
  constexpr int kChunks = kHeadDim / 32;
  constexpr bool kRowsInPlace = kBits == 2 && kChunks > 1;
  constexpr int kHighWords = chunk_words(kHeadDim, 1), kLowWords = chunk_words(kHeadDim, 2);
  uint32_t low[kLowWords], high[kHighWords] = {}, w[kBits == 3 ? 2 : kBits];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const QueryWords<kParts> query = q[c * kWarpLanes];
    if constexpr (kBits == 3) {
      if (c % kHighWords == 0) {
        load_words<kHeadDim, 1>(codes + tile_code_bytes(kHeadDim, 2), lane, c, high);
      }
    }
    if constexpr (kBits <= 3) {
      if (c * 2 % kLowWords == 0) {
        load_words<kHeadDim, 2>(codes, lane, c * 2, low);
      }
      w[0] = low[c * 2 % kLowWords], w[1] = low[c * 2 % kLowWords + 1];
    } else {
#pragma unroll
      for (int n = 0; n < kBits; n += 4) {
        uint32_t four[4];
        load_words<kHeadDim, kBits>(codes, lane, c * kBits + n, four);
        w[n] = four[0], w[n + 1] = four[1], w[n + 2] = four[2], w[n + 3] = four[3];
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      uint32_t a[4];
      if constexpr (kRowsInPlace) {
        unpack_keys_2_in_place(w[block], a);
      } else {
        unpack_keys<kBits>(w, high[c % kHighWords], block, a);
      }
      ptx::mma_16x8x32(sums[0][block], a, query.part.x, query.part.y);
      if constexpr (kParts == 2) {
        ptx::mma_16x8x32(sums[1][block], a, query.other_part.x, query.other_part.y);
      }
    }
  }
  if constexpr (kRowsInPlace) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      sums[part][0][2] >>= 4, sums[part][0][3] >>= 4;
      sums[part][1][2] >>= 4, sums[part][1][3] >>= 4;
    }
  }
}

// The same of a page with `n_wide` chunks of wide channels: a matrix of its own for each chunk.
template <int kHeadDim, int kParts>
__device__ __forceinline__ void multiply_wide_keys(const uint8_t* codes, int n_wide, int lane,
                                                   const QueryWords<kParts>* q,
                                                   int (&sums)[kParts][2][4]) {
  constexpr int kChunks = kHeadDim / kChunkChannels;
  constexpr int kWideBytes = tile_code_bytes(kChunkChannels, kWideBits);
  constexpr int kOtherBytes = tile_code_bytes(kChunkChannels, kBitsBesideWide);
  const auto multiply_wide = [&](int chunk) {
    multiply_keys<kChunkChannels, kWideBits, kParts>(codes + chunk * kWideBytes, lane,
                                                     q + chunk * kWarpLanes, sums);
  };
  const auto multiply_other = [&](int chunk, int of_wide) {
    multiply_keys<kChunkChannels, kBitsBesideWide, kParts>(
        codes + of_wide * kWideBytes + (chunk - of_wide) * kOtherBytes, lane,
        q + chunk * kWarpLanes, sums);
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
      unpack_value_8<kBase>(w[0], w[1], step0);
      unpack_value_8<kBase>(w[2], w[3], step1);
    }
    ptx::mma_16x8x16(acc[block], step0, p[0][0], p[0][1]);
    ptx::mma_16x8x16(acc[block], step1, p[1][0], p[1][1]);
  }
}

}  // namespace zipcache::cuda
