// Sealed tokens as fp16 rows again: to save them, and to seal them anew after their keys were
// changed. One element at a time by device_page.h: rare work, no need to be quick.
//
// As in cuda_kernels.h: device pointers stay the caller's, all work goes to the caller's stream.
#pragma once

#include <cstdint>

#include "base/expected.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/window_kernels.h"

namespace zipcache::cuda {

// The tokens of pages into rows of one sequence.
struct UnpackParams {
  std::int32_t n_pages = 0;  // of all heads, head after head, as many of each
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  const std::uint8_t* pool = nullptr;
  PageClass classes[kMaxClasses];
  const PageEntry* pages = nullptr;         // [n_pages], PageEntry::set counts from key_sets
  const std::int32_t* page_rows = nullptr;  // [n_pages, kPageTokens]: the slot's row in `to`; < 0:
                                            // left out, as are rows below first_row and from
                                            // end_row on. Row first_row is token 0 of `to`
  std::int32_t first_row = 0;
  std::int32_t end_row = 0;
  const HalfBits* key_sets = nullptr;  // [sets, 2, head_dim]: scale, min of stored channels
  const std::uint8_t* key_orders =
      nullptr;                           // [sets, head_dim], read for classes with wide channels
  const float* value_factors = nullptr;  // [n_kv_heads, head_dim]
  RowsAt to;                             // k or v may be nullptr: not wanted
};
Status unpack_pages(const UnpackParams& params, Stream stream);

// The order that pack() takes from the ranks that rank_tokens() kept.
struct OrderParams {
  std::int32_t n_tokens = 0;
  std::int32_t n_kv_heads = 0;
  const std::uint16_t* kept = nullptr;  // [n_kv_heads, kept_stride]
  std::int64_t kept_stride = 0;
  std::int32_t* order = nullptr;  // [n_kv_heads, n_tokens]
};
Status order_of_ranks(const OrderParams& params, Stream stream);

// Keys of n_tokens rows as floats [n_tokens, n_kv_heads, head_dim], and back.
struct ConvertParams {
  std::int32_t n_tokens = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  RowsAt rows;
  float* floats = nullptr;
};
Status keys_to_floats(const ConvertParams& params, Stream stream);
Status floats_to_keys(const ConvertParams& params, Stream stream);

}  // namespace zipcache::cuda
