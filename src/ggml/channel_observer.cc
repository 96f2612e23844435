#include "ggml/channel_observer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/half.h"

namespace zipcache::ggml {
namespace {

constexpr float kLargestHalf = 65504.0f;

// A comparison with NaN is false: it changes nothing.
void include(float value, float& min, float& max) {
  value = value > kLargestHalf ? kLargestHalf : value < -kLargestHalf ? -kLargestHalf : value;
  min = value < min ? value : min;
  max = value > max ? value : max;
}

}  // namespace

ChannelObserver::ChannelObserver(std::uint32_t layer, std::uint32_t key_row,
                                 std::uint32_t value_row) {
  seen_.layer = layer;
  seen_.key_min.assign(key_row, kLargestHalf);
  seen_.key_max.assign(key_row, -kLargestHalf);
  seen_.query_max.assign(key_row, 0.0f);
  seen_.value_min.assign(value_row, kLargestHalf);
  seen_.value_max.assign(value_row, -kLargestHalf);
}

void ChannelObserver::add_rows(cache::Tensor tensor, std::size_t n_rows,
                               const cache::RowsView& rows) {
  const bool is_key = tensor == cache::Tensor::kKey;
  std::vector<float>& min = is_key ? seen_.key_min : seen_.value_min;
  std::vector<float>& max = is_key ? seen_.key_max : seen_.value_max;
  for (std::size_t row = 0; row < n_rows; ++row) {
    const void* data = static_cast<const std::byte*>(rows.data) + row * rows.stride_bytes;
    for (std::size_t c = 0; c < min.size(); ++c) {
      include(rows.is_half ? half_to_float(static_cast<const Half*>(data)[c])
                           : static_cast<const float*>(data)[c],
              min[c], max[c]);
    }
  }
}

void ChannelObserver::add_queries(const cache::Query& query, std::uint32_t n_kv_heads,
                                  std::uint32_t key_dim, std::uint32_t value_dim) {
  seen_.n_kv_heads = n_kv_heads;
  seen_.key_dim = key_dim;
  seen_.value_dim = value_dim;
  const std::uint32_t heads_per_group = query.n_heads / n_kv_heads;
  for (std::size_t row = 0; row < query.n_rows; ++row) {
    for (std::size_t head = 0; head < std::size_t{n_kv_heads} * heads_per_group; ++head) {
      const float* q = query.q + row * query.q_row_stride + head * query.q_head_stride;
      float* max = &seen_.query_max[head / heads_per_group * key_dim];
      for (std::size_t c = 0; c < key_dim; ++c) {
        float ignored = 0.0f;
        include(std::abs(q[c]), ignored, max[c]);
      }
    }
  }
}

std::optional<policy::LayerCalibration> ChannelObserver::seen() const {
  const auto is_complete = [](const std::vector<float>& min, const std::vector<float>& max) {
    return std::equal(min.begin(), min.end(), max.begin(), std::less_equal<>());
  };
  if (seen_.n_kv_heads == 0 || !is_complete(seen_.key_min, seen_.key_max) ||
      !is_complete(seen_.value_min, seen_.value_max)) {
    return std::nullopt;
  }
  return seen_;
}

}  // namespace zipcache::ggml
