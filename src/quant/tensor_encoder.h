// Encodes one tensor of a block, head by head: gathers the head's tokens in slot order, divides
// channel-separable ones by their channel factors, finds ranges, turns them into grids, writes
// codes and parameters. Internal to this room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "quant/block_codec.h"
#include "quant/grid.h"

namespace zipcache::quant {

using format::BlockLayout;
using format::Granularity;
using format::Tensor;
using format::TokenParams;

// A block whose grids others are put on: its wide channels, channel factors, (scale, min) of
// channels and bases of token parameters.
struct Grids {
  const BlockLayout& layout;
  const std::byte* block;
};

// encode_block() on these grids instead of those that fit the tokens; what is outside gets the
// nearest code. nullptr: none are given.
void encode_on(const Grids* given, const BlockLayout& layout, const QuantRules& rules,
               std::span<const float> keys, std::span<const float> values,
               std::span<const std::uint8_t> tiers, std::byte* block, TaskTeam* team);

// Of a channelwise tensor, `channel` in stored order.
Grid stored_channel_grid(const Grids& of, Tensor tensor, std::uint32_t head, int cls,
                         std::size_t channel);

// What is kept of a range: wide channels are group 0 where there are any.
Range clipped(const format::TensorFormat& format, const TensorRules& rules, const Range& range,
              int cls, std::uint32_t group);

void store_half(std::byte* to, std::size_t index, float value);

class TensorEncoder {
 public:
  TensorEncoder(const BlockLayout& layout, Tensor tensor, const TensorRules& rules,
                std::span<const float> input, std::byte* block, const Grids* given = nullptr);

  // Heads [begin, end). Each head has bytes of its own.
  void encode(std::uint32_t begin, std::uint32_t end);

 private:
  float* row(std::size_t slot) { return &rows_[slot * n_channels_]; }

  // Fills rows_ with a head's tokens in slot order and stored channel order; those of classes with
  // codes divided by the channel factors, if any, which are stored.
  void load(std::uint32_t head);

  // rows_ from the engine's channels to stored ones.
  void order_channels();

  // Of equally wide codes, a channel's error grows with its range and with the queries it meets:
  // a few channels make up most of it (half of it an eighth of them, in SmolLM2).
  void choose_wide_channels(std::uint32_t head);

  // Finds the channel factors of slots [begin, end), or takes those given, stores them and divides
  // by them.
  void divide_by_factors(std::uint32_t head, int cls, std::size_t begin, std::size_t end);

  // A class of fp16 values: the matrix that codes would be, [inner][lanes].
  void write_exact(std::uint32_t head, int cls);
  void encode_channelwise(std::uint32_t head, int cls);

  // Codes of the channels of a group in a set of slots, up to `end` of the class, that share a
  // (scale, min) per channel.
  void encode_channels(std::uint32_t head, int cls, std::uint32_t group, std::uint32_t set,
                       std::size_t end);
  void encode_tokenwise(std::uint32_t head, int cls);
  void stretch_token(std::uint32_t head, int cls, std::uint32_t group, std::size_t slot,
                     const Grid& grid, float stretch);

  // After clipping; kByte grids always hold 0.
  Range token_range(int cls, std::uint32_t group, std::size_t slot);
  std::vector<Grid> store_token_grids(std::uint32_t head, int cls,
                                      const std::vector<Range>& ranges);
  float store_base(std::uint32_t head, int cls, const std::vector<Range>& ranges);

  // codes_ [slots of the class][channels of the group] -> the block's matrix.
  void pack(std::uint32_t head, int cls, std::uint32_t group);

  const BlockLayout& layout_;
  const Tensor tensor_;
  const format::TensorFormat& format_;
  const TensorRules& rules_;
  const std::span<const float> input_;
  const Grids* const given_;  // nullptr: they are found
  std::byte* const block_;
  const std::size_t n_tokens_;
  const std::size_t n_channels_;
  std::vector<std::uint32_t> order_;
  AlignedVector<float> rows_;  // [slot][stored channel] of the head at hand
  std::vector<std::uint16_t> channels_;
  AlignedVector<float> factors_;
  std::vector<Range> shared_ranges_;
  std::vector<std::uint8_t> codes_, transposed_;
};

}  // namespace zipcache::quant
