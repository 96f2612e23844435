#include "quant/tensor_encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/check.h"
#include "base/half.h"
#include "format/block_params.h"
#include "quant/corrections.h"
#include "quant/decode_codes.h"
#include "quant/row_ops.h"

namespace zipcache::quant {
namespace {

float load_base(const BlockLayout& layout, const std::byte* block, Tensor tensor,
                std::uint32_t head, int cls) {
  float base;
  const auto offset = static_cast<std::size_t>(cls) * sizeof(Half);
  format::load_halves(block + layout.token_base(tensor, head) + offset, 1, &base);
  return base;
}

}  // namespace

void store_half(std::byte* to, std::size_t index, float value) {
  const Half half = float_to_half(value);
  std::memcpy(to + index * sizeof(Half), &half, sizeof(Half));
}

Grid stored_channel_grid(const Grids& of, Tensor tensor, std::uint32_t head, int cls,
                         std::size_t channel) {
  const std::byte* stored = of.block + of.layout.channel_scale_min(tensor, head, cls);
  Grid grid;
  format::load_halves(stored + channel * sizeof(Half), 1, &grid.scale);
  format::load_halves(stored + (of.layout.head_dim(tensor) + channel) * sizeof(Half), 1, &grid.min);
  grid.shift = grid.min;
  grid.divisor = grid.scale;
  return grid;
}

Range clipped(const format::TensorFormat& format, const TensorRules& rules, const Range& range,
              int cls, std::uint32_t group) {
  const bool is_wide = format.wide_channels > 0 && group == 0;
  const float fraction = is_wide ? rules.wide_clip : rules.clip[cls];
  return rules.clip_about_zero ? Range{range.low * fraction, range.high * fraction}
                               : shrunk(range, fraction);
}

TensorEncoder::TensorEncoder(const BlockLayout& layout, Tensor tensor, const TensorRules& rules,
                             std::span<const float> input, std::byte* block, const Grids* given)
    : layout_(layout),
      tensor_(tensor),
      format_(layout.tensor(tensor)),
      rules_(rules),
      input_(input),
      given_(given),
      block_(block),
      n_tokens_(layout.shape().n_tokens),
      n_channels_(layout.head_dim(tensor)),
      order_(n_tokens_),
      rows_(n_tokens_ * n_channels_),
      channels_(n_channels_),
      factors_(n_channels_, 1.0f),
      codes_(rows_.size()),
      transposed_(tensor == Tensor::kValue ? rows_.size() : 0) {
  const std::size_t row = layout.shape().n_kv_heads * n_channels_;
  ZC_CHECK(!format_.given_factors || rules.given_factors.size() == row);
  ZC_CHECK(!format_.reordered || rules.channel_order.size() == row);
  ZC_CHECK(rules.channel_weights.empty() || rules.channel_weights.size() == row);
}

void TensorEncoder::encode(std::uint32_t begin, std::uint32_t end) {
  if (format_.slot_shared) {
    shared_ranges_.resize(n_tokens_);
    for (std::uint32_t head = 0; head < layout_.shape().n_kv_heads; ++head) {
      load(head);
      for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
        shared_ranges_[slot].include(range_of(row(slot), n_channels_));
      }
    }
  }
  for (std::uint32_t head = begin; head < end; ++head) {
    load(head);
    const bool corrected = format_.rank > 0 || format_.outliers > 0;
    const AlignedVector<float> exact = corrected ? rows_ : AlignedVector<float>();
    if (format_.outliers > 0) {
      set_outliers_aside(layout_, tensor_, head, rows_.data(), block_);
    }
    for (int cls = 0; cls < format_.n_classes; ++cls) {
      if (layout_.class_tokens(tensor_, cls) == 0 || format_.bits[cls] == format::kEvictedBits) {
        continue;
      }
      if (format_.bits[cls] == format::kExactBits) {
        write_exact(head, cls);
      } else if (format_.granularity == Granularity::kChannelwise) {
        encode_channelwise(head, cls);
      } else {
        encode_tokenwise(head, cls);
      }
    }
    if (corrected) {
      decode_codes(layout_, tensor_, block_, head, rows_.data());
      write_corrections(layout_, tensor_, head, exact.data(), rows_.data(), block_);
    }
  }
}

void TensorEncoder::load(std::uint32_t head) {
  format::slot_order(layout_, block_, head, order_.data());
  if (format_.reordered) {
    std::memcpy(block_ + layout_.channel_order(tensor_, head),
                &rules_.channel_order[head * n_channels_], n_channels_ * sizeof(std::uint16_t));
  }
  const std::size_t token_stride = layout_.shape().n_kv_heads * n_channels_;
  for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
    copy_finite(&input_[order_[slot] * token_stride + head * n_channels_], n_channels_, row(slot));
  }
  if (format_.wide_channels > 0) {
    choose_wide_channels(head);
  }
  format::channel_order(layout_, block_, tensor_, head, channels_.data());
  if (format_.reordered || format_.wide_channels > 0) {
    order_channels();
  }
  if (format_.granularity == Granularity::kChannelSeparable && layout_.param_slots(tensor_) > 0) {
    for (int cls = 0; cls < (format_.class_factors ? format_.n_classes : 1); ++cls) {
      const bool whole = !format_.class_factors;
      const std::size_t first =
          whole ? layout_.first_param_slot(tensor_) : layout_.first_slot(tensor_, cls);
      const std::size_t n =
          whole ? layout_.param_slots(tensor_) : layout_.class_tokens(tensor_, cls);
      divide_by_factors(head, cls, first, first + n);
    }
  }
}

void TensorEncoder::order_channels() {
  AlignedVector<float> unordered(n_channels_);
  for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
    std::copy_n(row(slot), n_channels_, unordered.data());
    for (std::size_t c = 0; c < n_channels_; ++c) {
      row(slot)[c] = unordered[channels_[c]];
    }
  }
}

void TensorEncoder::choose_wide_channels(std::uint32_t head) {
  if (given_ != nullptr) {
    std::memcpy(block_ + layout_.wide_mask(tensor_, head),
                given_->block + given_->layout.wide_mask(tensor_, head), n_channels_ / 8);
    return;
  }
  AlignedVector<float> low(row(0), row(0) + n_channels_), high(low);
  for (std::size_t slot = 1; slot < n_tokens_; ++slot) {
    track_ranges(row(slot), n_channels_, low.data(), high.data());
  }
  std::vector<float> error(n_channels_);
  for (std::size_t c = 0; c < n_channels_; ++c) {
    const float range = std::min(high[c] - low[c], kLargestHalf);
    const std::size_t at = head * n_channels_ + c;
    error[c] = range * range * (rules_.channel_weights.empty() ? 1.0f : rules_.channel_weights[at]);
  }
  std::iota(channels_.begin(), channels_.end(), std::uint16_t{0});
  std::stable_sort(channels_.begin(), channels_.end(),
                   [&](std::uint16_t a, std::uint16_t b) { return error[a] > error[b]; });
  format::write_wide_mask(layout_, block_, tensor_, head, channels_.data());
}

void TensorEncoder::divide_by_factors(std::uint32_t head, int cls, std::size_t begin,
                                      std::size_t end) {
  std::fill(factors_.begin(), factors_.end(), 0.0f);
  if (given_ != nullptr) {
    format::load_halves(given_->block + given_->layout.channel_factor(tensor_, head, cls),
                        n_channels_, factors_.data());
  } else if (format_.given_factors) {
    for (std::size_t c = 0; c < n_channels_; ++c) {
      factors_[c] = rules_.given_factors[head * n_channels_ + channels_[c]];
    }
  } else {
    for (std::size_t slot = begin; slot < end; ++slot) {
      track_magnitudes(row(slot), n_channels_, factors_.data());
    }
    for (float& factor : factors_) {
      factor = std::sqrt(factor);
    }
  }
  std::byte* out = block_ + layout_.channel_factor(tensor_, head, cls);
  for (std::size_t c = 0; c < n_channels_; ++c) {
    factors_[c] = saturated_half(factors_[c]);
    factors_[c] = factors_[c] > 0 ? factors_[c] : 1.0f;
    store_half(out, c, factors_[c]);
  }
  for (std::size_t slot = begin; slot < end; ++slot) {
    divide(row(slot), factors_.data(), n_channels_);
  }
}

void TensorEncoder::write_exact(std::uint32_t head, int cls) {
  const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
  const std::size_t first = layout_.first_slot(tensor_, cls);
  for (std::uint32_t group = 0; group < layout_.n_groups(tensor_); ++group) {
    const std::size_t width = layout_.group_channels(tensor_, group);
    std::byte* out = block_ + layout_.codes(tensor_, head, cls, group);
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      for (std::size_t c = 0; c < width; ++c) {
        const bool is_key = tensor_ == Tensor::kKey;
        store_half(out, is_key ? c * n_slots + slot : slot * width + c,
                   saturated_half(row(first + slot)[group * width + c]));
      }
    }
  }
}

void TensorEncoder::encode_channelwise(std::uint32_t head, int cls) {
  const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
  const std::size_t step = layout_.group_tokens(tensor_, cls);
  for (std::uint32_t group = 0; group < layout_.n_groups(tensor_); ++group) {
    for (std::uint32_t set = 0; set < layout_.n_token_groups(tensor_, cls); ++set) {
      encode_channels(head, cls, group, set, std::min((set + 1) * step, n_slots));
    }
    pack(head, cls, group);
  }
}

void TensorEncoder::encode_channels(std::uint32_t head, int cls, std::uint32_t group,
                                    std::uint32_t set, std::size_t end) {
  const std::size_t first_slot = layout_.first_slot(tensor_, cls);
  const std::size_t begin = set * std::size_t{layout_.group_tokens(tensor_, cls)};
  const std::size_t first = layout_.first_channel(tensor_, group);
  const std::size_t width = layout_.group_channels(tensor_, group);
  const int bits = layout_.code_bits(tensor_, cls, group);
  const auto channels_of = [&](std::size_t slot) { return row(first_slot + slot) + first; };
  AlignedVector<float> low(channels_of(begin), channels_of(begin) + width), high(low);
  for (std::size_t slot = begin + 1; given_ == nullptr && slot < end; ++slot) {
    track_ranges(channels_of(slot), width, low.data(), high.data());
  }

  AlignedVector<float> shift(width), divisor(width), offset(width);
  std::byte* scales = block_ + layout_.channel_scale_min(tensor_, head, cls, set);
  for (std::size_t c = 0; c < width; ++c) {
    const Grid grid =
        given_ != nullptr
            ? stored_channel_grid(*given_, tensor_, head, cls, first + c)
            : half_grid(rules_.rounding, clipped(format_, rules_, {low[c], high[c]}, cls, group),
                        bits);
    store_half(scales, first + c, grid.scale);
    store_half(scales, n_channels_ + first + c, grid.min);
    shift[c] = grid.shift;
    divisor[c] = grid.divisor;
    offset[c] = grid.offset;
  }

  const ChannelGrids grids{shift.data(), divisor.data(), offset.data()};
  for (std::size_t slot = begin; slot < end; ++slot) {
    codes_by_channel(channels_of(slot), width, grids, levels_of(bits), &codes_[slot * width]);
  }
}

void TensorEncoder::encode_tokenwise(std::uint32_t head, int cls) {
  const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
  const std::size_t n_groups = layout_.n_groups(tensor_);
  std::vector<Range> ranges(n_slots * n_groups);  // [group][slot]
  for (std::uint32_t group = 0; group < n_groups; ++group) {
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      ranges[group * n_slots + slot] = token_range(cls, group, slot);
    }
  }
  const std::vector<Grid> grids = store_token_grids(head, cls, ranges);

  const std::size_t first = layout_.first_slot(tensor_, cls);
  const std::size_t width = layout_.group_channels(tensor_);
  for (std::uint32_t group = 0; group < n_groups; ++group) {
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      codes_by_row(row(first + slot) + group * width, width, grids[group * n_slots + slot],
                   levels_of(format_.bits[cls]), &codes_[slot * width]);
      if (rules_.keep_length) {
        const Grid& grid = grids[group * n_slots + slot];
        const float stretch =
            length_ratio(row(first + slot) + group * width, &factors_[group * width],
                         &codes_[slot * width], width, grid.scale, grid.min);
        stretch_token(head, cls, group, first + slot, grid, stretch);
      }
    }
    pack(head, cls, group);
  }
}

void TensorEncoder::stretch_token(std::uint32_t head, int cls, std::uint32_t group,
                                  std::size_t slot, const Grid& grid, float stretch) {
  std::byte* scales = block_ + layout_.token_scale_min(tensor_, head, group);
  const std::size_t at = slot - layout_.first_param_slot(tensor_);
  if (format_.token_params == TokenParams::kByte) {
    const float base = load_base(layout_, block_, tensor_, head, cls);
    scales[at] = std::byte{format::encode_byte_scale(base, grid.scale * stretch)};
  } else {
    store_half(scales, at, saturated_half(grid.scale * stretch));
    store_half(scales, layout_.param_slots(tensor_) + at, saturated_half(grid.min * stretch));
  }
}

Range TensorEncoder::token_range(int cls, std::uint32_t group, std::size_t slot) {
  const std::size_t width = layout_.group_channels(tensor_);
  const std::size_t block_slot = layout_.first_slot(tensor_, cls) + slot;
  Range range = format_.slot_shared ? shared_ranges_[block_slot]
                                    : range_of(row(block_slot) + group * width, width);
  range = clipped(format_, rules_, range, cls, group);
  return format_.token_params == TokenParams::kByte ? with_zero(range) : range;
}

std::vector<Grid> TensorEncoder::store_token_grids(std::uint32_t head, int cls,
                                                   const std::vector<Range>& ranges) {
  const int bits = format_.bits[cls];
  const bool in_bytes = format_.token_params == TokenParams::kByte;
  const float base = in_bytes ? store_base(head, cls, ranges) : 0.0f;
  const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
  const std::size_t first = layout_.first_slot(tensor_, cls) - layout_.first_param_slot(tensor_);
  const std::size_t n_stored = layout_.param_slots(tensor_);
  std::vector<Grid> grids(ranges.size());
  for (std::size_t g = 0; g < grids.size(); ++g) {
    const auto group = static_cast<std::uint32_t>(g / n_slots);
    const std::size_t at = first + g % n_slots;
    std::byte* scales = block_ + layout_.token_scale_min(tensor_, head, group);
    if (in_bytes) {
      const ByteGrid byte = byte_grid(ranges[g], base, bits);
      scales[at] = std::byte{byte.scale_code};
      scales[n_stored + at] = std::byte{byte.zero_point};
      grids[g] = byte.grid;
    } else {
      grids[g] = half_grid(rules_.rounding, ranges[g], bits);
      store_half(scales, at, grids[g].scale);
      store_half(scales, n_stored + at, grids[g].min);
    }
  }
  return grids;
}

float TensorEncoder::store_base(std::uint32_t head, int cls, const std::vector<Range>& ranges) {
  float base;
  if (given_ != nullptr) {
    base = load_base(given_->layout, given_->block, tensor_, head, cls);
  } else {
    float widest = 0.0f;
    for (const Range& range : ranges) {
      widest = std::max(widest, range.high - range.low);
    }
    base = format::byte_scale_base(widest / levels_of(format_.bits[cls]));
  }
  store_half(block_ + layout_.token_base(tensor_, head), cls, base);
  return base;
}

void TensorEncoder::pack(std::uint32_t head, int cls, std::uint32_t group) {
  const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
  const std::size_t width = layout_.group_channels(tensor_, group);
  const int bits = layout_.code_bits(tensor_, cls, group);
  const std::span<std::byte> out{block_ + layout_.codes(tensor_, head, cls, group),
                                 layout_.codes_size(tensor_, cls, group)};
  if (tensor_ == Tensor::kKey) {
    format::pack_codes(bits, n_slots, width, {codes_.data(), n_slots * width}, out);
  } else {
    transpose(codes_.data(), n_slots, width, transposed_.data());
    format::pack_codes(bits, width, n_slots, {transposed_.data(), n_slots * width}, out);
  }
}

}  // namespace zipcache::quant
