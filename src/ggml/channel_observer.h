// The extremes of each channel that went into a layer's cache or was asked of it, for `zipcache
// calibrate`. A cache has one only where the setting `observe` is on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "cache/attention.h"
#include "cache/layer_cache.h"
#include "policy/calibration.h"

namespace zipcache::ggml {

class ChannelObserver {
 public:
  ChannelObserver(std::uint32_t layer, std::uint32_t key_row, std::uint32_t value_row);

  // Rows of new tokens. NaN counts as nothing, infinities as the largest finite half.
  void add_rows(cache::Tensor tensor, std::size_t n_rows, const cache::RowsView& rows);
  // The queries of one attention, whose heads also tell how rows split.
  void add_queries(const cache::Query& query, std::uint32_t n_kv_heads, std::uint32_t key_dim,
                   std::uint32_t value_dim);

  // Everything so far; nothing before the first attention.
  std::optional<policy::LayerCalibration> seen() const;

 private:
  policy::LayerCalibration seen_;
};

}  // namespace zipcache::ggml
