// Tokens that join a block: its grids are kept, or widened where keys have left them.
#include <array>
#include <vector>

#include "base/aligned.h"
#include "format/block_join.h"
#include "quant/block_codec.h"
#include "quant/grid.h"
#include "quant/row_ops.h"
#include "quant/tensor_encoder.h"

namespace zipcache::quant {
namespace {

// Further out by this share of the old range than the tokens at hand ask for, so that the next ones
// stay inside: the mean KLD of 512 decoded tokens (SmolLM2, 16 at a time) was 0.033 with a quarter,
// 0.030 with a tenth and 0.031 without.
constexpr float kMargin = 0.1f;
// Codes lose by each move to another grid: tokens may be this many steps outside. Half a step gave
// 0.026 on other windows, one 0.023, two 0.025.
constexpr float kSlackSteps = 1.0f;

Range widened(const Range& old, const Range& added, float scale) {
  const float margin = (old.high - old.low) * kMargin;
  const float slack = scale * kSlackSteps;
  return {added.low < old.low - slack ? added.low - margin : old.low,
          added.high > old.high + slack ? added.high + margin : old.high};
}

// Ranges of a head's keys [n_tokens, key_dim] by channel, in stored order.
std::vector<Range> ranges_of(const BlockLayout& layout, const std::byte* block, std::uint32_t head,
                             std::span<const float> keys) {
  const std::size_t dim = layout.shape().key_dim, row = dim * layout.shape().n_kv_heads;
  AlignedVector<float> low(dim), high(dim), x(dim);
  copy_finite(&keys[head * dim], dim, low.data());
  high = low;
  for (std::size_t begin = row; begin < keys.size(); begin += row) {
    copy_finite(&keys[begin + head * dim], dim, x.data());
    track_ranges(x.data(), dim, low.data(), high.data());
  }
  std::vector<std::uint16_t> order(dim);
  format::channel_order(layout, block, Tensor::kKey, head, order.data());
  std::vector<Range> ranges(dim);
  for (std::size_t c = 0; c < dim; ++c) {
    ranges[c] = {low[order[c]], high[order[c]]};
  }
  return ranges;
}

// One code matrix and its channels: RoPE turns slow channels a little with every token, so keys
// drift out of grids that fit the tokens before them (mean KLD as above 0.062 without this).
void widen_channels(const BlockLayout& layout, const TensorRules& rules, std::uint32_t head,
                    int cls, std::uint32_t group, std::span<const Range> added, std::byte* block) {
  const std::size_t dim = layout.shape().key_dim;
  const std::size_t n_slots = layout.class_tokens(Tensor::kKey, cls);
  const std::size_t first = layout.first_channel(Tensor::kKey, group);
  const std::size_t width = layout.group_channels(Tensor::kKey, group);
  const int bits = layout.code_bits(Tensor::kKey, cls, group);
  const std::span<std::byte> matrix{block + layout.codes(Tensor::kKey, head, cls, group),
                                    layout.codes_size(Tensor::kKey, cls, group)};
  std::byte* scales = block + layout.channel_scale_min(Tensor::kKey, head, cls);
  std::vector<std::uint8_t> codes;
  for (std::size_t c = 0; c < width; ++c) {
    std::byte* scale_at = scales + (first + c) * sizeof(Half);
    std::byte* min_at = scale_at + dim * sizeof(Half);
    const Grid stored = stored_channel_grid({layout, block}, Tensor::kKey, head, cls, first + c);
    const Range old{stored.min, stored.min + stored.scale * levels_of(bits)};
    const Range wanted =
        widened(old, clipped(layout.tensor(Tensor::kKey), rules, added[first + c], cls, group),
                stored.scale);
    if (wanted.low == old.low && wanted.high == old.high) {
      continue;
    }
    if (codes.empty()) {
      codes.resize(n_slots * width);
      format::unpack_codes(bits, n_slots, width, matrix, codes);
    }
    const Grid grid = half_grid(rules.rounding, wanted, bits);
    const std::size_t n_codes = std::size_t{1} << bits;
    std::array<float, 256> stood_for;
    std::array<std::uint8_t, 256> moved;
    for (std::size_t code = 0; code < n_codes; ++code) {
      stood_for[code] = stored.scale * static_cast<float>(code) + stored.min;
    }
    codes_by_row(stood_for.data(), n_codes, grid, levels_of(bits), moved.data());
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      codes[slot * width + c] = moved[codes[slot * width + c]];
    }
    store_half(scale_at, 0, grid.scale);
    store_half(min_at, 0, grid.min);
  }
  if (!codes.empty()) {
    format::pack_codes(bits, n_slots, width, codes, matrix);
  }
}

void widen_keys(const BlockLayout& layout, const TensorRules& rules, std::span<const float> keys,
                std::byte* block) {
  const format::TensorFormat& format = layout.tensor(Tensor::kKey);
  if (format.granularity != Granularity::kChannelwise) {
    return;
  }
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    const std::vector<Range> added = ranges_of(layout, block, head, keys);
    for (int cls = 0; cls < format.n_classes; ++cls) {
      for (std::uint32_t group = 0;
           layout.class_tokens(Tensor::kKey, cls) > 0 && group < layout.n_groups(Tensor::kKey);
           ++group) {
        widen_channels(layout, rules, head, cls, group, added, block);
      }
    }
  }
}

}  // namespace

void append_tokens(const BlockLayout& layout, const std::byte* block, const BlockLayout& added,
                   const QuantRules& rules, std::span<const float> keys,
                   std::span<const float> values, std::span<const std::uint8_t> tiers,
                   const BlockLayout& joined, std::byte* out, TaskTeam* team) {
  AlignedVector<std::byte> wide(block, block + layout.total_bytes());
  widen_keys(layout, rules.key, keys, wide.data());
  AlignedVector<std::byte> encoded(added.total_bytes());
  const Grids grids{layout, wide.data()};
  encode_on(&grids, added, rules, keys, values, tiers, encoded.data(), team);
  format::join_blocks(layout, wide.data(), added, encoded.data(), joined, out);
}

}  // namespace zipcache::quant
