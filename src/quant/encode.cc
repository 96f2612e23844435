// Encoding one tensor, head by head: gather the head's tokens in slot order, divide
// channel-separable ones by their channel factors, find ranges, turn them into grids, write codes
// and parameters.

#include <cmath>
#include <cstring>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "base/half.h"
#include "quant/block_codec.h"
#include "quant/grid.h"
#include "quant/row_ops.h"

namespace zipcache::quant {
namespace {

using format::BlockLayout;
using format::Granularity;
using format::Tensor;
using format::TokenParams;

void store_half(std::byte* to, std::size_t index, float value) {
  const Half half = float_to_half(value);
  std::memcpy(to + index * sizeof(Half), &half, sizeof(Half));
}

class TensorEncoder {
 public:
  TensorEncoder(const BlockLayout& layout, Tensor tensor, const TensorRules& rules,
                std::span<const float> input, std::byte* block)
      : layout_(layout),
        tensor_(tensor),
        format_(layout.tensor(tensor)),
        rules_(rules),
        input_(input),
        block_(block),
        n_tokens_(layout.shape().n_tokens),
        n_channels_(layout.head_dim(tensor)),
        order_(n_tokens_),
        rows_(n_tokens_ * n_channels_),
        factors_(n_channels_),
        codes_(rows_.size()),
        transposed_(tensor == Tensor::kValue ? rows_.size() : 0) {}

  void encode() {
    const std::uint32_t n_heads = layout_.shape().n_kv_heads;
    if (format_.slot_shared) {
      shared_ranges_.resize(n_tokens_);
      for (std::uint32_t head = 0; head < n_heads; ++head) {
        load(head);
        for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
          shared_ranges_[slot].include(range_of(row(slot), n_channels_));
        }
      }
    }
    for (std::uint32_t head = 0; head < n_heads; ++head) {
      load(head);
      for (int cls = 0; cls < format_.n_classes; ++cls) {
        if (layout_.class_tokens(tensor_, cls) == 0) {
          continue;
        }
        if (format_.granularity == Granularity::kChannelwise) {
          encode_channelwise(head, cls);
        } else {
          encode_tokenwise(head, cls);
        }
      }
    }
  }

 private:
  float* row(std::size_t slot) { return &rows_[slot * n_channels_]; }

  // Fills rows_ with a head's tokens in slot order, divided by the channel factors, if any, which
  // are stored.
  void load(std::uint32_t head) {
    format::slot_order(layout_, block_, head, order_.data());
    const std::size_t token_stride = layout_.shape().n_kv_heads * n_channels_;
    for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
      copy_finite(&input_[order_[slot] * token_stride + head * n_channels_], n_channels_,
                  row(slot));
    }
    if (format_.granularity == Granularity::kChannelSeparable) {
      if (format_.class_factors) {
        for (int cls = 0; cls < format_.n_classes; ++cls) {
          const std::size_t first = layout_.first_slot(tensor_, cls);
          divide_by_factors(head, cls, first, first + layout_.class_tokens(tensor_, cls));
        }
      } else {
        divide_by_factors(head, 0, 0, n_tokens_);
      }
    }
  }

  // Finds the channel factors of slots [begin, end), stores them and divides by them.
  void divide_by_factors(std::uint32_t head, int cls, std::size_t begin, std::size_t end) {
    std::fill(factors_.begin(), factors_.end(), 0.0f);
    for (std::size_t slot = begin; slot < end; ++slot) {
      track_magnitudes(row(slot), n_channels_, factors_.data());
    }
    std::byte* out = block_ + layout_.channel_factor(tensor_, head, cls);
    for (std::size_t c = 0; c < n_channels_; ++c) {
      factors_[c] = saturated_half(std::sqrt(factors_[c]));
      factors_[c] = factors_[c] > 0 ? factors_[c] : 1.0f;
      store_half(out, c, factors_[c]);
    }
    for (std::size_t slot = begin; slot < end; ++slot) {
      divide(row(slot), factors_.data(), n_channels_);
    }
  }

  void encode_channelwise(std::uint32_t head, int cls) {
    const std::size_t first = layout_.first_slot(tensor_, cls);
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    AlignedVector<float> low(row(first), row(first) + n_channels_), high(low);
    for (std::size_t slot = first + 1; slot < first + n_slots; ++slot) {
      track_ranges(row(slot), n_channels_, low.data(), high.data());
    }

    AlignedVector<float> shift(n_channels_), divisor(n_channels_), offset(n_channels_);
    std::byte* scales = block_ + layout_.channel_scale_min(tensor_, head, cls);
    for (std::size_t c = 0; c < n_channels_; ++c) {
      const Grid grid = half_grid(rules_.rounding, shrunk({low[c], high[c]}, rules_.clip[cls]),
                                  format_.bits[cls]);
      store_half(scales, c, grid.scale);
      store_half(scales, n_channels_ + c, grid.min);
      shift[c] = grid.shift;
      divisor[c] = grid.divisor;
      offset[c] = grid.offset;
    }

    const ChannelGrids grids{shift.data(), divisor.data(), offset.data()};
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      codes_by_channel(row(first + slot), n_channels_, grids, levels_of(format_.bits[cls]),
                       &codes_[slot * n_channels_]);
    }
    pack(head, cls, 0);
  }

  void encode_tokenwise(std::uint32_t head, int cls) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t n_groups = layout_.n_groups(tensor_);
    std::vector<Range> ranges(n_slots * n_groups);  // [group][slot]
    for (std::uint32_t group = 0; group < n_groups; ++group) {
      for (std::size_t slot = 0; slot < n_slots; ++slot) {
        ranges[group * n_slots + slot] = token_range(cls, group, slot);
      }
    }
    const std::vector<Grid> grids = format_.token_params == TokenParams::kByte
                                        ? store_byte_grids(head, cls, ranges)
                                        : store_half_grids(head, cls, ranges);

    const std::size_t first = layout_.first_slot(tensor_, cls);
    const std::size_t width = layout_.group_channels(tensor_);
    for (std::uint32_t group = 0; group < n_groups; ++group) {
      for (std::size_t slot = 0; slot < n_slots; ++slot) {
        codes_by_row(row(first + slot) + group * width, width, grids[group * n_slots + slot],
                     levels_of(format_.bits[cls]), &codes_[slot * width]);
      }
      pack(head, cls, group);
    }
  }

  // After clipping; kByte grids always hold 0.
  Range token_range(int cls, std::uint32_t group, std::size_t slot) {
    const std::size_t width = layout_.group_channels(tensor_);
    const std::size_t block_slot = layout_.first_slot(tensor_, cls) + slot;
    Range range = format_.slot_shared ? shared_ranges_[block_slot]
                                      : range_of(row(block_slot) + group * width, width);
    range = shrunk(range, rules_.clip[cls]);
    return format_.token_params == TokenParams::kByte ? with_zero(range) : range;
  }

  std::vector<Grid> store_half_grids(std::uint32_t head, int cls,
                                     const std::vector<Range>& ranges) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t first = layout_.first_slot(tensor_, cls);
    std::vector<Grid> grids(ranges.size());
    for (std::size_t g = 0; g < grids.size(); ++g) {
      const auto group = static_cast<std::uint32_t>(g / n_slots);
      const std::size_t slot = first + g % n_slots;
      std::byte* scales = block_ + layout_.token_scale_min(tensor_, head, group);
      grids[g] = half_grid(rules_.rounding, ranges[g], format_.bits[cls]);
      store_half(scales, slot, grids[g].scale);
      store_half(scales, n_tokens_ + slot, grids[g].min);
    }
    return grids;
  }

  std::vector<Grid> store_byte_grids(std::uint32_t head, int cls,
                                     const std::vector<Range>& ranges) {
    const int bits = format_.bits[cls];
    float widest = 0.0f;
    for (const Range& range : ranges) {
      widest = std::max(widest, range.high - range.low);
    }
    const float base = format::byte_scale_base(widest / levels_of(bits));
    store_half(block_ + layout_.token_base(tensor_, head), cls, base);

    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t first = layout_.first_slot(tensor_, cls);
    std::vector<Grid> grids(ranges.size());
    for (std::size_t g = 0; g < grids.size(); ++g) {
      const auto group = static_cast<std::uint32_t>(g / n_slots);
      const std::size_t slot = first + g % n_slots;
      std::byte* scales = block_ + layout_.token_scale_min(tensor_, head, group);
      const ByteGrid byte = byte_grid(ranges[g], base, bits);
      scales[slot] = std::byte{byte.scale_code};
      scales[n_tokens_ + slot] = std::byte{byte.zero_point};
      grids[g] = byte.grid;
    }
    return grids;
  }

  // codes_ [slots of the class][channels of the group] -> the block's matrix.
  void pack(std::uint32_t head, int cls, std::uint32_t group) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t width = layout_.group_channels(tensor_);
    const std::span<std::byte> out{block_ + layout_.codes(tensor_, head, cls, group),
                                   layout_.codes_size(tensor_, cls)};
    if (tensor_ == Tensor::kKey) {
      format::pack_codes(format_.bits[cls], n_slots, width, {codes_.data(), n_slots * width}, out);
    } else {
      transpose(codes_.data(), n_slots, width, transposed_.data());
      format::pack_codes(format_.bits[cls], width, n_slots, {transposed_.data(), n_slots * width},
                         out);
    }
  }

  const BlockLayout& layout_;
  const Tensor tensor_;
  const format::TensorFormat& format_;
  const TensorRules& rules_;
  const std::span<const float> input_;
  std::byte* const block_;
  const std::size_t n_tokens_;
  const std::size_t n_channels_;
  std::vector<std::uint32_t> order_;
  AlignedVector<float> rows_;  // [slot][channel] of the head at hand
  AlignedVector<float> factors_;
  std::vector<Range> shared_ranges_;
  std::vector<std::uint8_t> codes_, transposed_;
};

std::size_t tensor_size(const BlockLayout& layout, Tensor t) {
  return std::size_t{layout.shape().n_tokens} * layout.shape().n_kv_heads * layout.head_dim(t);
}

}  // namespace

void encode_block(const BlockLayout& layout, const QuantRules& rules, std::span<const float> keys,
                  std::span<const float> values, std::span<const std::uint8_t> tiers,
                  std::byte* block) {
  const std::size_t n_tokens = layout.shape().n_tokens;
  ZC_CHECK(keys.size() == tensor_size(layout, Tensor::kKey));
  ZC_CHECK(values.size() == tensor_size(layout, Tensor::kValue));
  ZC_CHECK(tiers.size() == n_tokens * layout.shape().n_kv_heads ||
           (tiers.empty() && layout.n_tiers() == 1));
  std::memset(block, 0, layout.total_bytes());
  if (layout.n_tiers() > 1) {
    for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
      format::write_tiers(layout, block, head, &tiers[head * n_tokens]);
    }
  }
  TensorEncoder(layout, Tensor::kKey, rules.key, keys, block).encode();
  TensorEncoder(layout, Tensor::kValue, rules.value, values, block).encode();
}

void replace_keys(const BlockLayout& layout, const QuantRules& rules, std::span<const float> keys,
                  std::byte* block) {
  ZC_CHECK(keys.size() == tensor_size(layout, Tensor::kKey));
  TensorEncoder(layout, Tensor::kKey, rules.key, keys, block).encode();
}

}  // namespace zipcache::quant
