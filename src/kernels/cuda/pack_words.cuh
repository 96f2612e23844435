// Codes in registers to words of a device page: the inverse of unpack.cuh, for the lane that owns
// the codes. Positions come from device_page.h; all arguments but the codes are constants, so a
// store is a handful of shifts and one vector write.
#pragma once

#include "kernels/cuda/device_page.h"

namespace zipcache::cuda {

// kWords consecutive words of a lane.
template <int kHeadDim, int kPlaneBits, int kWords>
__device__ __forceinline__ void store_words(uint8_t* plane, int lane, int first,
                                            const uint32_t (&words)[kWords]) {
  constexpr int kSide =
      chunk_words(kHeadDim, kPlaneBits) < kWords ? chunk_words(kHeadDim, kPlaneBits) : kWords;
#pragma unroll
  for (int n = 0; n < kWords; n += kSide) {
    uint8_t* at = plane + word_offset(kHeadDim, kPlaneBits, lane, first + n);
    if constexpr (kSide == 4) {
      *reinterpret_cast<uint4*>(at) = {words[n], words[n + 1], words[n + 2], words[n + 3]};
    } else if constexpr (kSide == 2) {
      *reinterpret_cast<uint2*>(at) = {words[n], words[n + 1]};
    } else {
      *reinterpret_cast<uint32_t*>(at) = words[n];
    }
  }
}

// codes[n][c]: token g + 8n of the tile, channel c of the lane's 8 in `chunk`.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void store_key_words(uint8_t* tile, int lane, int chunk,
                                                const uint32_t (&codes)[4][8]) {
  constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  uint32_t low[kLowBits] = {}, high[1] = {};  // 32 codes are kLowBits words
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      // Lane 0's position, as if it were chunk 0: word and shift do not depend on lane or chunk.
      const int block = n / 2, row = n % 2, upper = c / 4;
      const int word = kBits <= 3   ? block
                       : kBits == 4 ? block * 2 + row
                                    : (block * 2 + row) * 2 + upper;
      const CodePosition at = key_position(kHeadDim, kBits, n * 8, c);
      low[word] |= (codes[n][c] & ((1u << kLowBits) - 1)) << at.low.shift;
      if (kBits == 3) {
        high[0] |= (codes[n][c] >> 2) << at.high.shift;
      }
    }
  }
  store_words<kHeadDim, kLowBits>(tile, lane, chunk * kLowBits, low);
  if constexpr (kBits == 3) {
    store_words<kHeadDim, 1>(tile + tile_code_bytes(kHeadDim, 2), lane, chunk, high);
  }
}

// codes[n][c]: token 16 * (n / 4) + 8 * (n / 2 % 2) + 2i + n % 2, channel c of the lane's 8 in
// `part` (64 channels: four 16-channel matrix tiles). `start` is where the tile's values begin.
template <int kHeadDim, int kBits>
__device__ __forceinline__ void store_value_words(uint8_t* start, int lane, int part,
                                                  const uint32_t (&codes)[8][8]) {
  constexpr int kLowBits = kBits == 3 ? 2 : kBits;
  uint32_t low[2 * kLowBits] = {}, high[2] = {};  // 64 codes
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const int block = c / 2, row = c % 2, step = n / 4;
      const int word = kBits <= 3   ? block
                       : kBits == 4 ? block * 2 + step
                                    : (block * 2 + step) * 2 + row;
      const CodePosition at = value_position(kHeadDim, kBits, step * 16 + n / 2 % 2 * 8 + n % 2, c);
      low[word] |= (codes[n][c] & ((1u << kLowBits) - 1)) << at.low.shift;
      if (kBits == 3) {
        high[block / 2] |= (codes[n][c] >> 2) << at.high.shift;
      }
    }
  }
  store_words<kHeadDim, kLowBits>(start, lane, part * 2 * kLowBits, low);
  if constexpr (kBits == 3) {
    store_words<kHeadDim, 1>(start + tile_code_bytes(kHeadDim, 2), lane, part * 2, high);
  }
}

}  // namespace zipcache::cuda
