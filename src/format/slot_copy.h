// Tokens of blocks copied into another block, codes and parameters as they are. Internal to this
// room.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "format/block.h"

namespace zipcache::format {

inline constexpr std::array kTensors{Tensor::kKey, Tensor::kValue};

// Whether nothing in a tensor but its channel parameters is shared by tokens, and all have codes.
// (Nor are stored orders of channels copied: the policies that use them are there to compare with.)
bool can_be_taken_apart(const TensorFormat& format);
bool can_be_taken_apart(const BlockShape& shape);

struct Source {
  const BlockLayout* layout;
  const std::byte* block;
};

// Slots [first, first + n) of a source: the next ones of the new block.
struct SourceSlots {
  std::uint32_t source = 0;
  std::uint32_t first = 0, n = 0;
};

// Writes the codes and parameters of a head; parts of `out` that are not written are left alone.
// Channel parameters are those of the first source.
// REQUIRES: the sources and `to` differ in tokens and class sizes only, can_be_taken_apart(), the
// first source has tokens of every class that `to` has any of, and `runs` hold as many slots of
// each class as `to`, classes in order.
void copy_head(std::span<const Source> sources, std::span<const SourceSlots> runs,
               const BlockLayout& to, std::byte* out, std::uint32_t head);

}  // namespace zipcache::format
