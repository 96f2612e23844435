// The bytes of a device page: the codes of 64 tokens of one KV head, in the order in which the
// matrix instructions of the attention kernel take them. Normative text: docs/device_format.md.
//
// A page is 2 tiles of 32 tokens. A tile is contiguous and a multiple of 128 bytes:
//
//   [K codes][V planes][s: 32 x fp16][z: 32 x fp16]
//
// K and V have widths of their own (2, 3, 4, 8). Codes of a tensor are one matrix; of keys with
// wide channels, one matrix per 32 channels, wide ones first. A 3-bit matrix has two planes: the
// low 2 bits, then the high bit; the others have one. With L = lane of a warp, g = L / 4, i = L %
// 4, and head_dim the channels of the matrix:
//
//   A plane of p bits gives every lane head_dim * p / 32 words. Words stand in chunks: chunk after
//   chunk, in a chunk lane after lane, of a lane 4 consecutive words (2 in the 1-bit plane of
//   head_dim 64), so that one 16-byte load of a lane is what its next matrix instructions multiply.
//
//   Keys: lane L owns tokens g, g+8, g+16, g+24 of the tile and, of every 32 channels, the 8 from
//   8 * i on. Values: lane L owns, of every 64 channels, the 8 from 8 * g on, of the tokens
//   2i, 2i+1, 2i+8, 2i+9 and those + 16.
//
// value of an element:   key    scale[c] * k + min[c]              (per scale set and channel)
//                               (c: stored channel; see PageClass)
//                        value  factor[c] * s[t] * (v - z[t])      (factor per sequence and head)
//
// This header is the sole owner of these positions: packers, kernels and tests go through it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ZC_HOST_DEVICE __host__ __device__
#else
#define ZC_HOST_DEVICE
#endif

namespace zipcache::cuda {

inline constexpr int kTileTokens = 32;
inline constexpr int kPageTokens = 64;
inline constexpr int kTilesPerPage = kPageTokens / kTileTokens;
inline constexpr int kWarpLanes = 32;
inline constexpr int kTileAlignment = 128;  // bytes; page addresses count in this unit too
inline constexpr int kTileParamBytes = kTileTokens * 2 * 2;
inline constexpr int kTailTokens = 128;  // capacity of the fp16 tail of a sequence

ZC_HOST_DEVICE constexpr bool is_code_width(int bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}
ZC_HOST_DEVICE constexpr bool is_head_dim(int head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

// Widths of the two tensors of a page.
struct PageClass {
  std::uint8_t key_bits = 4;
  std::uint8_t value_bits = 4;
  // > 0: the first so many chunks of the keys' stored channels have `wide_bits` instead. Which
  // channels these are is a property of the scale set: its order names the channel of every stored
  // one. 0: channels are stored as they come.
  std::uint8_t wide_chunks = 0;
  std::uint8_t wide_bits = 0;

  ZC_HOST_DEVICE constexpr int chunk_bits(int chunk) const {
    return chunk < wide_chunks ? wide_bits : key_bits;
  }
};
inline constexpr int kChunkChannels = 32;
// What the kernels have wide channels of: the others, of the same page, have fewer bits.
inline constexpr int kWideBits = 4, kBitsBesideWide = 2;
ZC_HOST_DEVICE constexpr bool is_page_class(int head_dim, PageClass cls) {
  return is_code_width(cls.key_bits) && is_code_width(cls.value_bits) &&
         (cls.wide_chunks == 0 || (cls.wide_bits == kWideBits && cls.key_bits == kBitsBesideWide &&
                                   cls.wide_chunks < head_dim / kChunkChannels));
}

// --- Sizes and offsets inside a tile -------------------------------------------------------------

// Bytes of a matrix of codes (all its planes) in a tile.
ZC_HOST_DEVICE constexpr int tile_code_bytes(int head_dim, int bits) {
  return kTileTokens * head_dim * bits / 8;
}
// Where the matrix of a chunk of keys starts, if there are wide channels.
ZC_HOST_DEVICE constexpr int key_chunk_offset(PageClass cls, int chunk) {
  const int n_wide = chunk < cls.wide_chunks ? chunk : cls.wide_chunks;
  return tile_code_bytes(kChunkChannels, n_wide * cls.wide_bits + (chunk - n_wide) * cls.key_bits);
}
ZC_HOST_DEVICE constexpr int tile_value_offset(int head_dim, PageClass cls) {
  return key_chunk_offset(cls, head_dim / kChunkChannels);
}
ZC_HOST_DEVICE constexpr int tile_param_offset(int head_dim, PageClass cls) {
  return tile_value_offset(head_dim, cls) + tile_code_bytes(head_dim, cls.value_bits);
}
ZC_HOST_DEVICE constexpr int tile_bytes(int head_dim, PageClass cls) {
  return tile_param_offset(head_dim, cls) + kTileParamBytes;
}
ZC_HOST_DEVICE constexpr int page_bytes(int head_dim, PageClass cls) {
  return kTilesPerPage * tile_bytes(head_dim, cls);
}

// Halves from the tile's first parameter to the s or z of token t. s: lane group g reads its four
// tokens at once; z: lane i reads the pairs (2i, 2i+1), (2i+8, 2i+9), ... at once.
ZC_HOST_DEVICE constexpr int scale_index(int t) { return (t & 7) * 4 + (t >> 3); }
ZC_HOST_DEVICE constexpr int zero_index(int t) {
  return kTileTokens + ((t >> 1) & 3) * 8 + (t >> 3) * 2 + (t & 1);
}

// Scales stand multiplied by this, zeros divided: of 2 bits a mask leaves the codes of the first 16
// tokens of a tile in places 16 times lower than those of the others, and a shift that would bring
// them together is one more operation for each word. Exact.
ZC_HOST_DEVICE constexpr float value_param_unit(int bits, int token) {
  return bits == 2 && token < kTileTokens / 2 ? 16.0f : 1.0f;
}

// --- Words of a plane ----------------------------------------------------------------------------

ZC_HOST_DEVICE constexpr int lane_words(int head_dim, int plane_bits) {
  return head_dim * plane_bits / 32;
}
// Words that a lane has side by side.
ZC_HOST_DEVICE constexpr int chunk_words(int head_dim, int plane_bits) {
  return lane_words(head_dim, plane_bits) < 4 ? lane_words(head_dim, plane_bits) : 4;
}
// Byte offset of word `n` of `lane` from the start of its plane.
ZC_HOST_DEVICE constexpr int word_offset(int head_dim, int plane_bits, int lane, int n) {
  const int side = chunk_words(head_dim, plane_bits);
  return ((n / side) * kWarpLanes + lane) * side * 4 + (n % side) * 4;
}

// --- Where a code is -----------------------------------------------------------------------------

// One run of bits: `bits` wide at bit `shift` of the 32-bit little-endian word at byte `offset` of
// the tile. A code is low.value | high.value << 2; high.bits is 0 except for 3-bit codes.
struct BitField {
  int offset = 0;
  int shift = 0;
  int bits = 0;
};
struct CodePosition {
  BitField low, high;
};

// Of a 3-bit code: where the nibble n (0..3) of half-word `half` of the virtual 4-bit word v (0..3)
// has its high bit in the word of the 1-bit plane that serves these four virtual words. Shifting
// that word by 0, >>1, <<2, <<1 (for v = 0..3) brings the bits to bit 2 of every nibble.
ZC_HOST_DEVICE constexpr int high_bit_shift(int v, int half, int n) {
  constexpr int kBase[4] = {2, 3, 0, 1};
  return 16 * half + 4 * n + kBase[v];
}

// Of a 3-bit key: the bit of its byte in the 1-bit plane. Shifting that plane by 0, >>1, <<1, <<2
// (lower channels; 0, >>1, >>2, >>3 for upper ones) brings the bits of (block, row) = (0, 0), (0,
// 1), (1, 0), (1, 1) beside the low bits.
ZC_HOST_DEVICE constexpr int key_high_bit(int block, int row, int upper) {
  constexpr int kLower[4] = {2, 3, 1, 0};
  const int n = block * 2 + row;
  return upper != 0 ? 4 + n : kLower[n];
}

// Key of `token` (0..31 of the tile), channel 0..head_dim-1 of one matrix of codes. A byte of a
// word holds codes of one channel, so that a mask leaves four codes of one token.
ZC_HOST_DEVICE constexpr CodePosition key_position(int head_dim, int bits, int token, int channel) {
  const int lane = (token & 7) * 4 + ((channel >> 3) & 3);
  const int row = (token >> 3) & 1;      // which row of the matrix tile: g or g + 8
  const int block = token >> 4;          // which of the two 16-token matrix tiles
  const int chunk = channel >> 5;        // 8 channels of the lane: one k-step
  const int upper = (channel >> 2) & 1;  // a0, a1 or a2, a3
  const int byte = 8 * (channel & 3);
  CodePosition at;
  switch (bits) {
    case 2:
      at.low = {word_offset(head_dim, 2, lane, chunk * 2 + block), byte + 4 * row + 2 * upper, 2};
      break;
    case 3:
      at.low = {word_offset(head_dim, 2, lane, chunk * 2 + block), byte + 4 * row + 2 * upper, 2};
      at.high = {tile_code_bytes(head_dim, 2) + word_offset(head_dim, 1, lane, chunk),
                 byte + key_high_bit(block, row, upper), 1};
      break;
    case 4:
      at.low = {word_offset(head_dim, 4, lane, (chunk * 2 + block) * 2 + row), byte + 4 * upper, 4};
      break;
    default:
      at.low = {word_offset(head_dim, 8, lane, ((chunk * 2 + block) * 2 + row) * 2 + upper), byte,
                8};
      break;
  }
  return at;
}

// Key of `token`, stored channel 0..head_dim-1 of a page.
ZC_HOST_DEVICE constexpr CodePosition key_position(int head_dim, PageClass cls, int token,
                                                   int channel) {
  if (cls.wide_chunks == 0) {
    return key_position(head_dim, cls.key_bits, token, channel);
  }
  const int chunk = channel / kChunkChannels, start = key_chunk_offset(cls, chunk);
  CodePosition at =
      key_position(kChunkChannels, cls.chunk_bits(chunk), token, channel % kChunkChannels);
  at.low.offset += start;
  at.high.offset += start;
  return at;
}

// Value of `token` (0..31 of the tile), channel 0..head_dim-1; offsets count from where the tile's
// values start.
ZC_HOST_DEVICE constexpr CodePosition value_position(int head_dim, int bits, int token,
                                                     int channel) {
  const int lane = ((channel >> 3) & 7) * 4 + ((token >> 1) & 3);
  const int block = (channel >> 6) * 4 + ((channel >> 1) & 3);  // which 16-channel matrix tile
  const int row = channel & 1;                                  // its row g or g + 8
  const int step = token >> 4;                                  // which 16-token k-step
  const int upper = (token >> 3) & 1;
  const int half = token & 1;
  const int nibble = 2 * upper + (1 - row);
  CodePosition at;
  switch (bits) {
    case 2:
      at.low = {word_offset(head_dim, 2, lane, block),
                16 * half + 2 * (2 * (step + 2 * upper) + (1 - row)), 2};
      break;
    case 3:
      at.low = {word_offset(head_dim, 2, lane, block), 16 * half + 2 * (2 * nibble + step), 2};
      at.high = {tile_code_bytes(head_dim, 2) + word_offset(head_dim, 1, lane, block / 2),
                 high_bit_shift((block & 1) * 2 + step, half, nibble), 1};
      break;
    case 4:
      at.low = {word_offset(head_dim, 4, lane, block * 2 + step), 16 * half + 4 * nibble, 4};
      break;
    default:
      at.low = {word_offset(head_dim, 8, lane, (block * 2 + step) * 2 + row), 16 * half + 8 * upper,
                8};
      break;
  }
  return at;
}

// --- Page lists ----------------------------------------------------------------------------------

inline constexpr int kMaxClasses = 8;

// One page of a (sequence, KV head). Pages of a class should stand together in a list: a change of
// class or scale set costs the kernel a reload.
struct PageEntry {
  std::uint32_t unit = 0;   // address: pool + unit * kTileAlignment
  std::uint16_t set = 0;    // scale set of the keys, counted from the row's first one
  std::uint8_t tokens = 0;  // 1..64, the first of the page
  std::uint8_t cls = 0;     // index into the launch's classes
};
static_assert(sizeof(PageEntry) == 8);

static_assert(tile_bytes(128, {2, 2}) == 2176 && page_bytes(128, {2, 2}) == 4352);
static_assert(tile_bytes(128, {4, 4}) == 4224 && page_bytes(128, {4, 4}) == 8448);
static_assert(tile_bytes(128, {2, 3, 2, 4}) == 3200 && tile_bytes(128, {2, 2, 2, 4}) == 2688);
static_assert(tile_bytes(64, {3, 2}) % kTileAlignment == 0);
static_assert(tile_bytes(64, {2, 3, 1, 4}) % kTileAlignment == 0);
static_assert(tile_bytes(256, {8, 3}) % kTileAlignment == 0);

}  // namespace zipcache::cuda
