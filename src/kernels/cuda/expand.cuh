// Tokens of a page, or fp16 rows, as matrix operands in shared memory: what prefill attention
// multiplies many queries by. Codes become their values here, rounded to fp16 once; the channel
// factors of the values stay out (the caller multiplies the sum).
//
// Both forms are rows of 16-byte units, so that one load of a lane is the operand of two matrix
// instructions, in the order of channels (keys) or tokens (values) that the other operand has too:
//
//   keys    [64 tokens][head_dim]: unit n is stored channels 8n .. 8n+7; the lane i = L % 4 of a
//           product takes unit 4c + i of every 32 channels c
//   values  [head_dim][64 tokens]: unit 4t + i is tokens 2i, 2i+1 and those + 8, + 16, + 24 of tile
//   t
//
// A warp expands 64 channels of one tile (32 tokens) at a time.
#pragma once

#include "kernels/cuda/params.h"
#include "kernels/cuda/unpack.cuh"

namespace zipcache::cuda {

// The 8 lanes of one phase of a 16-byte access touch two rows: odd ones swap the halves of every
// 128 bytes, so that they meet different banks.
__device__ __forceinline__ int operand_unit(int row, int units_per_row, int unit) {
  return row * units_per_row + (unit ^ ((row & 1) << 2));
}
template <int kHeadDim>
__device__ __forceinline__ int key_unit(int token, int unit) {
  return operand_unit(token, kHeadDim / 8, unit);
}
// Values are stored for channels 8g + c and read for channels g + 8c: both parities must differ.
__device__ __forceinline__ int value_unit(int channel, int unit) {
  return channel * (kPageTokens / 8) + (unit ^ (((channel ^ (channel >> 3)) & 1) << 2));
}

__device__ __forceinline__ uint32_t same_halves(float x) { return ptx::pack_half2(x, x); }
// Two codes as numbers, from 1024 + code / inverse_place.
__device__ __forceinline__ uint32_t code_of(uint32_t u, float inverse_place) {
  return ptx::fma_half2(u, same_halves(inverse_place), same_halves(-1024.0f * inverse_place));
}

// --- Codes ---------------------------------------------------------------------------------------

// Words [first, first + kCount) of this lane.
template <int kHeadDim, int kPlaneBits, int kCount>
__device__ __forceinline__ void load_lane_words(const uint8_t* plane, int lane, int first,
                                                uint32_t (&words)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; n += 2) {
    const uint2 v =
        *reinterpret_cast<const uint2*>(plane + word_offset(kHeadDim, kPlaneBits, lane, first + n));
    words[n] = v.x, words[n + 1] = v.y;
  }
}

// Word `n` of the 1-bit plane of 3-bit codes.
template <int kHeadDim>
__device__ __forceinline__ uint32_t load_high_word(const uint8_t* codes, int lane, int n) {
  return *reinterpret_cast<const uint32_t*>(codes + tile_code_bytes(kHeadDim, 2) +
                                            word_offset(kHeadDim, 1, lane, n));
}

// Keys of 32 channels of a tile: chunk `of_matrix` of a matrix of kMatrixChannels channels. `set`:
// scales and minima of the page's stored channels, `chunk` which 32 of these.
template <int kHeadDim, int kMatrixChannels, int kBits>
__device__ __forceinline__ void expand_key_chunk(const uint8_t* codes, int of_matrix,
                                                 const HalfBits* set, int tile, int chunk,
                                                 uint4* keys, int lane) {
  constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  const int g = lane >> 2, i = lane & 3;
  uint32_t w[kLowBits], high = 0;
  load_lane_words<kMatrixChannels, kLowBits>(codes, lane, of_matrix * kLowBits, w);
  if constexpr (kBits == 3) {
    high = load_high_word<kMatrixChannels>(codes, lane, of_matrix);
  }
  const uint4 scale = ptx::load_16(set + chunk * 32 + i * 8);
  const uint4 minimum = ptx::load_16(set + kHeadDim + chunk * 32 + i * 8);
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint32_t a[4];
    unpack_keys<kBits>(w, high, block, a);
    // Bytes 2n and 2n + 1, with the exponent of 1024 above each.
    const auto value = [](uint32_t bytes, int n, int upper, uint32_t s, uint32_t m) {
      const uint32_t u = __byte_perm(bytes, 0x64646464u, n == 0 ? 0x4140 : 0x4342);
      return ptx::fma_half2(code_of(u, key_inverse_place(kBits, upper)), s, m);
    };
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      keys[key_unit<kHeadDim>(tile * kTileTokens + block * 16 + row * 8 + g, chunk * 4 + i)] = {
          value(a[row], 0, 0, scale.x, minimum.x), value(a[row], 1, 0, scale.y, minimum.y),
          value(a[2 + row], 0, 1, scale.z, minimum.z), value(a[2 + row], 1, 1, scale.w, minimum.w)};
    }
  }
}

// Keys of stored channels [64 * part, +64) of a tile.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void expand_keys(const uint8_t* codes, const HalfBits* set, int tile,
                                            int part, uint4* keys, int lane) {
#pragma unroll 1  // here and below: the caller's sums are in registers
  for (int chunk = part * 2; chunk < part * 2 + 2; ++chunk) {
    expand_key_chunk<kHeadDim, kHeadDim, kBits>(codes, chunk, set, tile, chunk, keys, lane);
  }
}
template <int kHeadDim>
__device__ __forceinline__ void expand_wide_keys(const uint8_t* codes, PageClass cls,
                                                 const HalfBits* set, int tile, int part,
                                                 uint4* keys, int lane) {
#pragma unroll 1
  for (int chunk = part * 2; chunk < part * 2 + 2; ++chunk) {
    const uint8_t* matrix = codes + key_chunk_offset(cls, chunk);
    if (chunk < cls.wide_chunks) {
      expand_key_chunk<kHeadDim, kChunkChannels, kWideBits>(matrix, 0, set, tile, chunk, keys,
                                                            lane);
    } else {
      expand_key_chunk<kHeadDim, kChunkChannels, kBitsBesideWide>(matrix, 0, set, tile, chunk, keys,
                                                                  lane);
    }
  }
}

// Values of channels [64 * part, +64) of a tile, without their channel factors. `params`: the
// tile's token scales and zeros.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void expand_values(const uint8_t* codes, const HalfBits* params,
                                              int tile, int part, uint4* values, int lane) {
  constexpr CodeBase kBase = CodeBase::k1024;
  constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  const int g = lane >> 2, i = lane & 3;
  const uint4 z = *reinterpret_cast<const uint4*>(params + zero_index(i * 2));
  const uint4 s = *reinterpret_cast<const uint4*>(params + scale_index(i * 2));
  const uint32_t zeros[4] = {z.x, z.y, z.z, z.w};
  const uint32_t scales[4] = {__byte_perm(s.x, s.z, 0x5410), __byte_perm(s.x, s.z, 0x7632),
                              __byte_perm(s.y, s.w, 0x5410), __byte_perm(s.y, s.w, 0x7632)};
#pragma unroll 1
  for (int pair = part * 2; pair < part * 2 + 2; ++pair) {  // of 16-channel blocks
    uint32_t w[kLowBits], high = 0;
    load_lane_words<kHeadDim, kLowBits>(codes, lane, pair * kLowBits, w);
    if constexpr (kBits == 3) {
      high = load_high_word<kHeadDim>(codes, lane, pair);
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      uint32_t step[2][4];
      if constexpr (kBits == 2) {
        unpack_value_2<kBase>(w[block], step[0], step[1]);
      } else if constexpr (kBits == 3) {
        uint32_t nibbles[2];
        merge_planes(w[block], block == 0 ? high : high << 2, block == 0 ? high >> 1 : high << 1,
                     nibbles);
        unpack_value_nibbles<kBase, 7>(nibbles[0], step[0]);
        unpack_value_nibbles<kBase, 7>(nibbles[1], step[1]);
      } else if constexpr (kBits == 4) {
        unpack_value_nibbles<kBase, 15>(w[block * 2], step[0]);
        unpack_value_nibbles<kBase, 15>(w[block * 2 + 1], step[1]);
      } else {
        unpack_value_8<kBase>(w[block * 4], w[block * 4 + 1], step[0]);
        unpack_value_8<kBase>(w[block * 4 + 2], w[block * 4 + 3], step[1]);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float inverse = 1.0f / value_place(kBits, row);
        uint32_t out[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t code = code_of(step[n / 2][n % 2 * 2 + row], inverse);
          out[n] = ptx::mul_half2(ptx::sub_half2(code, zeros[n]), scales[n]);
        }
        const int channel = pair / 2 * 64 + g * 8 + pair % 2 * 4 + block * 2 + row;
        values[value_unit(channel, tile * 4 + i)] = {out[0], out[1], out[2], out[3]};
      }
    }
  }
}

// Both for one page: all warps of the block share the work.
template <int kHeadDim>
__device__ __forceinline__ void expand_page(const uint8_t* page, PageClass cls, const HalfBits* set,
                                            uint4* keys, uint4* values, int warp, int n_warps,
                                            int lane) {
  constexpr int kParts = kHeadDim / 64;
  for (int unit = warp; unit < 2 * kTilesPerPage * kParts; unit += n_warps) {
    const int part = unit % kParts, tile = unit / kParts % kTilesPerPage;
    const uint8_t* codes = page + tile * tile_bytes(kHeadDim, cls);
    if (unit < kTilesPerPage * kParts && cls.wide_chunks > 0) {
      expand_wide_keys<kHeadDim>(codes, cls, set, tile, part, keys, lane);
      continue;
    }
    if (unit < kTilesPerPage * kParts) {
      switch (cls.key_bits) {
        case 2:
          expand_keys<kHeadDim, 2>(codes, set, tile, part, keys, lane);
          break;
        case 3:
          expand_keys<kHeadDim, 3>(codes, set, tile, part, keys, lane);
          break;
        case 4:
          expand_keys<kHeadDim, 4>(codes, set, tile, part, keys, lane);
          break;
        default:
          expand_keys<kHeadDim, 8>(codes, set, tile, part, keys, lane);
          break;
      }
      continue;
    }
    const HalfBits* params =
        reinterpret_cast<const HalfBits*>(codes + tile_param_offset(kHeadDim, cls));
    codes += tile_value_offset(kHeadDim, cls);
    switch (cls.value_bits) {
      case 2:
        expand_values<kHeadDim, 2>(codes, params, tile, part, values, lane);
        break;
      case 3:
        expand_values<kHeadDim, 3>(codes, params, tile, part, values, lane);
        break;
      case 4:
        expand_values<kHeadDim, 4>(codes, params, tile, part, values, lane);
        break;
      default:
        expand_values<kHeadDim, 8>(codes, params, tile, part, values, lane);
        break;
    }
  }
}

// --- fp16 rows -----------------------------------------------------------------------------------

// 64 tokens of which `n_tokens` are there; the others become zeros (what lies there may be NaN).
template <int kHeadDim>
__device__ __forceinline__ void expand_rows(const HalfBits* k, const HalfBits* v,
                                            int64_t token_stride, int n_tokens, uint4* keys,
                                            uint4* values, int warp, int n_warps, int lane) {
  constexpr int kParts = kHeadDim / 64;
  const int g = lane >> 2, i = lane & 3;
  for (int unit = warp; unit < 2 * kTilesPerPage * kParts; unit += n_warps) {
    const int part = unit % kParts, tile = unit / kParts % kTilesPerPage;
    if (unit < kTilesPerPage * kParts) {
#pragma unroll 2
      for (int n = 0; n < 8; ++n) {
        const int token = tile * kTileTokens + n / 2 * 8 + g, of_row = part * 8 + n % 2 * 4 + i;
        keys[key_unit<kHeadDim>(token, of_row)] =
            token < n_tokens ? ptx::load_16(k + token * token_stride + of_row * 8)
                             : uint4{0, 0, 0, 0};
      }
      continue;
    }
#pragma unroll 1
    for (int channel = part * 64 + g * 8; channel < part * 64 + g * 8 + 8; channel += 4) {
      uint2 x[8];  // of tokens 2i, 2i+1, 2i+8, 2i+9, ...
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int token = tile * kTileTokens + n / 2 * 8 + i * 2 + n % 2;
        x[n] = {0, 0};
        if (token < n_tokens) {
          x[n] = __ldg(reinterpret_cast<const uint2*>(v + token * token_stride + channel));
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t out[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          out[n] =
              __byte_perm(c < 2 ? x[n * 2].x : x[n * 2].y, c < 2 ? x[n * 2 + 1].x : x[n * 2 + 1].y,
                          c % 2 == 0 ? 0x5410 : 0x7632);
        }
        values[value_unit(channel + c, tile * 4 + i)] = {out[0], out[1], out[2], out[3]};
      }
    }
  }
}

}  // namespace zipcache::cuda
