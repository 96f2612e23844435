// A larger block of the tokens of two, the second made on the grids of the first
// (quant/block_codec.h): codes and parameters are copied, nothing is quantized again.
#pragma once

#include <cstddef>
#include <optional>

#include "format/block.h"

namespace zipcache::format {

// The shape of `second` tokens after those of `first`; nothing when the two differ in more than
// tokens and class sizes, when a tensor has parts that are not one token's own (as in
// block_subset.h), when `second` has tokens of a class that `first` has none of, or when the
// classes of K and V would no longer be nested.
std::optional<BlockShape> joined_shape(const BlockShape& first, const BlockShape& second);

// Writes the block; its tokens are those of `first`, then those of `second`. `out` is
// to.total_bytes() long and 64-byte aligned.
// REQUIRES: `to` was made from joined_shape() of the same arguments, and the blocks have the same
// channel parameters.
void join_blocks(const BlockLayout& first, const std::byte* first_block, const BlockLayout& second,
                 const std::byte* second_block, const BlockLayout& to, std::byte* out);

}  // namespace zipcache::format
