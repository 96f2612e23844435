// A smaller block of some of a block's tokens: codes and parameters are copied, nothing is
// quantized again.
//
// A block has as many tokens of each tier in every head, but which tokens are in a tier differs by
// head, and so does how many of the kept ones are. The smaller block therefore has, of each tier,
// as many tokens as the head that keeps most, and the other heads fill up with tokens that are not
// kept. Kept tokens come first, in their old order; the fillers after them mean nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "format/block.h"

namespace zipcache::format {

// The shape of the smaller block; nothing when that is no smaller, or when a tensor has parts that
// are not one token's own: slots shared over heads, token groups, a low-rank term, outliers. (Nor
// are stored orders of channels and classes without codes copied: the policies that use them are
// there to compare with.) REQUIRES: kept[token] for each of the block's tokens, at least one of
// them true.
std::optional<BlockShape> subset_shape(const BlockLayout& layout, const std::byte* block,
                                       const std::vector<bool>& kept);

// Writes the smaller block; `out` is to.total_bytes() long and 64-byte aligned.
// REQUIRES: `to` was made from subset_shape() of the same arguments.
void copy_subset(const BlockLayout& layout, const std::byte* block, const std::vector<bool>& kept,
                 const BlockLayout& to, std::byte* out);

}  // namespace zipcache::format
