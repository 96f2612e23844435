// What a tensor stores beside its codes (GEAR, arXiv 2403.05527): X ~ Q(X - S) + L + S, with a
// low-rank term L and outliers S. Rows here are [n_tokens, head_dim] of one head, in slot order and
// stored channel order. Internal to this room.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/block.h"

namespace zipcache::quant {

// Chooses the outliers: of each vector (a channel of K, a token of V) the largest and the smallest
// half of format.outliers elements. Stores their places and puts the vector's mean in their stead.
void set_outliers_aside(const format::BlockLayout& layout, format::Tensor t, std::uint32_t head,
                        float* rows, std::byte* block);

// Stores the low-rank term of what the codes miss outside the outliers, and the outliers' values:
// what codes and term miss there. exact: the head's rows; coded: what its codes stand for.
void write_corrections(const format::BlockLayout& layout, format::Tensor t, std::uint32_t head,
                       const float* exact, const float* coded, std::byte* block);

// rows += low-rank term + outliers.
void add_corrections(const format::BlockLayout& layout, format::Tensor t, const std::byte* block,
                     std::uint32_t head, float* rows);

}  // namespace zipcache::quant
