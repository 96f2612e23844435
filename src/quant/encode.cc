// Encoding one tensor, head by head: gather the head's tokens in slot order, divide
// channel-separable ones by their channel factors, find ranges, turn them into grids, write codes
// and parameters.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "base/half.h"
#include "format/block_params.h"
#include "quant/block_codec.h"
#include "quant/corrections.h"
#include "quant/decode_codes.h"
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
        channels_(n_channels_),
        factors_(n_channels_, 1.0f),
        codes_(rows_.size()),
        transposed_(tensor == Tensor::kValue ? rows_.size() : 0) {
    const std::size_t row = layout.shape().n_kv_heads * n_channels_;
    ZC_CHECK(!format_.given_factors || rules.given_factors.size() == row);
    ZC_CHECK(!format_.reordered || rules.channel_order.size() == row);
    ZC_CHECK(rules.channel_weights.empty() || rules.channel_weights.size() == row);
  }

  // Heads [begin, end). Each head has bytes of its own.
  void encode(std::uint32_t begin, std::uint32_t end) {
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

 private:
  float* row(std::size_t slot) { return &rows_[slot * n_channels_]; }

  // Fills rows_ with a head's tokens in slot order and stored channel order; those of classes with
  // codes divided by the channel factors, if any, which are stored.
  void load(std::uint32_t head) {
    format::slot_order(layout_, block_, head, order_.data());
    if (format_.reordered) {
      std::memcpy(block_ + layout_.channel_order(tensor_, head),
                  &rules_.channel_order[head * n_channels_], n_channels_ * sizeof(std::uint16_t));
    }
    const std::size_t token_stride = layout_.shape().n_kv_heads * n_channels_;
    for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
      copy_finite(&input_[order_[slot] * token_stride + head * n_channels_], n_channels_,
                  row(slot));
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

  // rows_ from the engine's channels to stored ones.
  void order_channels() {
    AlignedVector<float> unordered(n_channels_);
    for (std::size_t slot = 0; slot < n_tokens_; ++slot) {
      std::copy_n(row(slot), n_channels_, unordered.data());
      for (std::size_t c = 0; c < n_channels_; ++c) {
        row(slot)[c] = unordered[channels_[c]];
      }
    }
  }

  // Of equally wide codes, a channel's error grows with its range and with the queries it meets:
  // a few channels make up most of it (half of it an eighth of them, in SmolLM2).
  void choose_wide_channels(std::uint32_t head) {
    AlignedVector<float> low(row(0), row(0) + n_channels_), high(low);
    for (std::size_t slot = 1; slot < n_tokens_; ++slot) {
      track_ranges(row(slot), n_channels_, low.data(), high.data());
    }
    std::vector<float> error(n_channels_);
    for (std::size_t c = 0; c < n_channels_; ++c) {
      const float range = std::min(high[c] - low[c], kLargestHalf);
      const std::size_t at = head * n_channels_ + c;
      error[c] =
          range * range * (rules_.channel_weights.empty() ? 1.0f : rules_.channel_weights[at]);
    }
    std::iota(channels_.begin(), channels_.end(), std::uint16_t{0});
    std::stable_sort(channels_.begin(), channels_.end(),
                     [&](std::uint16_t a, std::uint16_t b) { return error[a] > error[b]; });
    format::write_wide_mask(layout_, block_, tensor_, head, channels_.data());
  }

  // Finds the channel factors of slots [begin, end), or takes those given, stores them and divides
  // by them.
  void divide_by_factors(std::uint32_t head, int cls, std::size_t begin, std::size_t end) {
    std::fill(factors_.begin(), factors_.end(), 0.0f);
    if (format_.given_factors) {
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

  // A class of fp16 values: the matrix that codes would be, [inner][lanes].
  void write_exact(std::uint32_t head, int cls) {
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

  void encode_channelwise(std::uint32_t head, int cls) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t step = layout_.group_tokens(tensor_, cls);
    for (std::uint32_t group = 0; group < layout_.n_groups(tensor_); ++group) {
      for (std::uint32_t set = 0; set < layout_.n_token_groups(tensor_, cls); ++set) {
        encode_channels(head, cls, group, set, std::min((set + 1) * step, n_slots));
      }
      pack(head, cls, group);
    }
  }

  // Codes of the channels of a group in a set of slots, up to `end` of the class, that share a
  // (scale, min) per channel.
  void encode_channels(std::uint32_t head, int cls, std::uint32_t group, std::uint32_t set,
                       std::size_t end) {
    const std::size_t first_slot = layout_.first_slot(tensor_, cls);
    const std::size_t begin = set * std::size_t{layout_.group_tokens(tensor_, cls)};
    const std::size_t first = layout_.first_channel(tensor_, group);
    const std::size_t width = layout_.group_channels(tensor_, group);
    const int bits = layout_.code_bits(tensor_, cls, group);
    const auto channels_of = [&](std::size_t slot) { return row(first_slot + slot) + first; };
    AlignedVector<float> low(channels_of(begin), channels_of(begin) + width), high(low);
    for (std::size_t slot = begin + 1; slot < end; ++slot) {
      track_ranges(channels_of(slot), width, low.data(), high.data());
    }

    AlignedVector<float> shift(width), divisor(width), offset(width);
    std::byte* scales = block_ + layout_.channel_scale_min(tensor_, head, cls, set);
    for (std::size_t c = 0; c < width; ++c) {
      const Grid grid = half_grid(rules_.rounding, clipped({low[c], high[c]}, cls, group), bits);
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

  Range clipped(const Range& range, int cls, std::uint32_t group) const {
    const bool is_wide = format_.wide_channels > 0 && group == 0;
    const float fraction = is_wide ? rules_.wide_clip : rules_.clip[cls];
    return rules_.clip_about_zero ? Range{range.low * fraction, range.high * fraction}
                                  : shrunk(range, fraction);
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

  void stretch_token(std::uint32_t head, int cls, std::uint32_t group, std::size_t slot,
                     const Grid& grid, float stretch) {
    std::byte* scales = block_ + layout_.token_scale_min(tensor_, head, group);
    const std::size_t at = slot - layout_.first_param_slot(tensor_);
    if (format_.token_params == TokenParams::kByte) {
      float base;
      const auto offset = static_cast<std::size_t>(cls) * sizeof(Half);
      format::load_halves(block_ + layout_.token_base(tensor_, head) + offset, 1, &base);
      scales[at] = std::byte{format::encode_byte_scale(base, grid.scale * stretch)};
    } else {
      store_half(scales, at, saturated_half(grid.scale * stretch));
      store_half(scales, layout_.param_slots(tensor_) + at, saturated_half(grid.min * stretch));
    }
  }

  // After clipping; kByte grids always hold 0.
  Range token_range(int cls, std::uint32_t group, std::size_t slot) {
    const std::size_t width = layout_.group_channels(tensor_);
    const std::size_t block_slot = layout_.first_slot(tensor_, cls) + slot;
    Range range = format_.slot_shared ? shared_ranges_[block_slot]
                                      : range_of(row(block_slot) + group * width, width);
    range = clipped(range, cls, group);
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
      store_half(scales, slot - layout_.first_param_slot(tensor_), grids[g].scale);
      store_half(scales + layout_.param_slots(tensor_) * sizeof(Half),
                 slot - layout_.first_param_slot(tensor_), grids[g].min);
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
      const std::size_t at = slot - layout_.first_param_slot(tensor_);
      scales[at] = std::byte{byte.scale_code};
      scales[layout_.param_slots(tensor_) + at] = std::byte{byte.zero_point};
      grids[g] = byte.grid;
    }
    return grids;
  }

  // codes_ [slots of the class][channels of the group] -> the block's matrix.
  void pack(std::uint32_t head, int cls, std::uint32_t group) {
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

  const BlockLayout& layout_;
  const Tensor tensor_;
  const format::TensorFormat& format_;
  const TensorRules& rules_;
  const std::span<const float> input_;
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

// What can be encoded apart: heads [begin, end) of a tensor.
struct Part {
  Tensor tensor;
  std::uint32_t begin, end;
};

// Where tokens share their range among the heads, a tensor is one part.
void add_parts(const BlockLayout& layout, Tensor tensor, std::vector<Part>* parts) {
  const std::uint32_t n_heads = layout.shape().n_kv_heads;
  const std::uint32_t step = layout.tensor(tensor).slot_shared ? n_heads : 1;
  for (std::uint32_t head = 0; head < n_heads; head += step) {
    parts->push_back({tensor, head, head + step});
  }
}

std::size_t tensor_size(const BlockLayout& layout, Tensor t) {
  return std::size_t{layout.shape().n_tokens} * layout.shape().n_kv_heads * layout.head_dim(t);
}

}  // namespace

void encode_block(const BlockLayout& layout, const QuantRules& rules, std::span<const float> keys,
                  std::span<const float> values, std::span<const std::uint8_t> tiers,
                  std::byte* block, TaskTeam* team) {
  const std::size_t n_tokens = layout.shape().n_tokens;
  ZC_CHECK(keys.size() == tensor_size(layout, Tensor::kKey));
  ZC_CHECK(values.size() == tensor_size(layout, Tensor::kValue));
  ZC_CHECK(tiers.size() == n_tokens * layout.shape().n_kv_heads ||
           (tiers.empty() && layout.n_tiers() == 1));
  std::fill_n(block, layout.total_bytes(), std::byte{0});
  if (layout.n_tiers() > 1) {
    for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
      format::write_tiers(layout, block, head, &tiers[head * n_tokens]);
    }
  }
  std::vector<Part> parts;
  add_parts(layout, Tensor::kKey, &parts);
  add_parts(layout, Tensor::kValue, &parts);
  for_each(team, parts.size(), [&](std::size_t i) {
    const auto& [tensor, begin, end] = parts[i];
    const bool is_key = tensor == Tensor::kKey;
    TensorEncoder(layout, tensor, is_key ? rules.key : rules.value, is_key ? keys : values, block)
        .encode(begin, end);
  });
}

void replace_keys(const BlockLayout& layout, const QuantRules& rules, std::span<const float> keys,
                  std::byte* block) {
  ZC_CHECK(keys.size() == tensor_size(layout, Tensor::kKey));
  // What was given when the block was made stays: it is read back from the block.
  const std::size_t dim = layout.shape().key_dim, n_heads = layout.shape().n_kv_heads;
  std::vector<std::uint16_t> order(dim * n_heads);
  std::vector<float> factors(dim * n_heads), stored(dim), weights(dim * n_heads);
  TensorRules kept = rules.key;
  for (std::uint32_t head = 0; head < n_heads; ++head) {
    format::channel_order(layout, block, Tensor::kKey, head, &order[head * dim]);
    for (std::size_t wide = 0; wide < layout.shape().key.wide_channels; ++wide) {
      weights[head * dim + order[head * dim + wide]] = 1.0f;
    }
    // Where all tokens are exact there are none.
    if (layout.shape().key.given_factors && layout.param_slots(Tensor::kKey) > 0) {
      format::load_halves(block + layout.channel_factor(Tensor::kKey, head, 0), dim, stored.data());
      for (std::size_t c = 0; c < dim; ++c) {
        factors[head * dim + order[head * dim + c]] = stored[c];
      }
    }
  }
  kept.channel_order = order;
  kept.given_factors = factors;
  kept.channel_weights = weights;
  TensorEncoder(layout, Tensor::kKey, kept, keys, block).encode(0, layout.shape().n_kv_heads);
}

void replace_values(const BlockLayout& from, const std::byte* block, const BlockLayout& layout,
                    const TensorRules& rules, std::span<const float> values, std::byte* out) {
  ZC_CHECK(from.shape().key == layout.shape().key &&
           from.shape().n_tokens == layout.shape().n_tokens);
  ZC_CHECK(values.size() == tensor_size(layout, Tensor::kValue));
  std::fill_n(out, layout.total_bytes(), std::byte{0});
  std::vector<std::uint8_t> tiers(layout.shape().n_tokens);
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    format::read_tiers(from, block, head, tiers.data());
    format::write_tiers(layout, out, head, tiers.data());
    format::copy_tensor(from, block, layout, out, Tensor::kKey, head);
  }
  TensorEncoder(layout, Tensor::kValue, rules, values, out).encode(0, layout.shape().n_kv_heads);
}

}  // namespace zipcache::quant
