// Reading and writing the parts of a block that are not codes: tiers and byte-sized scales.

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "format/block.h"

namespace zipcache::format {
namespace {

constexpr float kLargestHalf = 65504.0f;
// A scale in units of its base is a float kept to 4 bits of exponent and 4 of mantissa.
constexpr int kDroppedMantissaBits = 23 - 4;
constexpr std::int32_t kExponentBias = (127 - 15) << 4;

bool is_wide(const std::byte* mask, std::uint32_t channel) {
  return (std::to_integer<unsigned>(mask[channel / 8]) >> (channel % 8) & 1u) != 0;
}

std::array<std::uint32_t, 4> count_tiers(const std::vector<std::uint8_t>& tiers) {
  std::array<std::uint32_t, 4> counts{};
  for (const std::uint8_t tier : tiers) {
    ++counts[tier & 3];
  }
  return counts;
}

bool has_layouts_counts(const BlockLayout& layout, const std::vector<std::uint8_t>& tiers) {
  const auto counts = count_tiers(tiers);
  for (std::uint32_t tier = 0; tier < counts.size(); ++tier) {
    if (counts[tier] != (tier < layout.n_tiers() ? layout.tier_tokens(tier) : 0)) {
      return false;
    }
  }
  return true;
}

bool all_finite(const std::byte* halves, std::size_t n) {
  for (std::size_t h = 0; h < n; ++h) {
    Half half;
    std::memcpy(&half, halves + h * sizeof(Half), sizeof(Half));
    if ((half & 0x7c00u) == 0x7c00u) {
      return false;
    }
  }
  return true;
}

bool has_finite_scales(const BlockLayout& layout, const std::byte* block, Tensor t,
                       std::uint32_t head) {
  const TensorFormat& f = layout.tensor(t);
  const std::size_t n_channels = layout.head_dim(t);
  bool finite = true;
  if (f.granularity == Granularity::kChannelwise) {
    for (int cls = 0; cls < f.n_classes; ++cls) {
      finite = finite && all_finite(block + layout.channel_scale_min(t, head, cls),
                                    layout.n_token_groups(t, cls) * 2 * n_channels);
    }
    return finite;
  }
  if (layout.param_slots(t) == 0) {
    return true;
  }
  if (f.granularity == Granularity::kChannelSeparable) {
    finite = all_finite(block + layout.channel_factor(t, head, 0),
                        (f.class_factors ? f.n_classes : 1) * n_channels);
  }
  if (f.token_params == TokenParams::kByte) {
    return finite && all_finite(block + layout.token_base(t, head), f.n_classes);
  }
  for (std::uint32_t group = 0; group < layout.n_groups(t); ++group) {
    finite = finite && all_finite(block + layout.token_scale_min(t, head, group),
                                  std::size_t{2} * layout.param_slots(t));
  }
  return finite;
}

bool all_below(const std::byte* places, std::size_t n, std::uint32_t limit) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t place;
    std::memcpy(&place, places + i * sizeof place, sizeof place);
    if (place >= limit) {
      return false;
    }
  }
  return true;
}

bool has_sound_corrections(const BlockLayout& layout, const std::byte* block, Tensor t,
                           std::uint32_t head) {
  const TensorFormat& f = layout.tensor(t);
  const std::uint32_t n_tokens = layout.shape().n_tokens;
  if (f.reordered) {
    std::vector<std::uint16_t> order(layout.head_dim(t)), sorted(order.size());
    channel_order(layout, block, t, head, order.data());
    std::iota(sorted.begin(), sorted.end(), std::uint16_t{0});
    if (!std::is_permutation(order.begin(), order.end(), sorted.begin())) {
      return false;
    }
  }
  if (f.wide_channels > 0) {
    const std::byte* mask = block + layout.wide_mask(t, head);
    std::uint32_t n_wide = 0;
    for (std::uint32_t c = 0; c < layout.head_dim(t); ++c) {
      n_wide += is_wide(mask, c) ? 1 : 0;
    }
    if (n_wide != f.wide_channels) {
      return false;
    }
  }
  const std::size_t n = std::size_t{layout.outlier_vectors(t)} * f.outliers;
  const std::byte* places = block + layout.outliers(t, head);
  return all_finite(block + layout.low_rank(t, head),
                    f.rank * (std::size_t{n_tokens} + layout.head_dim(t))) &&
         all_below(places, n, t == Tensor::kKey ? n_tokens : layout.head_dim(t)) &&
         all_finite(places + n * sizeof(std::uint16_t), n);
}

bool is_sound_tensor(const BlockLayout& layout, const std::byte* block, Tensor t,
                     std::uint32_t head) {
  return has_finite_scales(layout, block, t, head) && has_sound_corrections(layout, block, t, head);
}

}  // namespace

float byte_scale(float base, std::uint8_t e) {
  const auto bits = static_cast<std::uint32_t>(e + kExponentBias) << kDroppedMantissaBits;
  return base * std::bit_cast<float>(bits);
}

std::uint8_t encode_byte_scale(float base, float scale) {
  ZC_CHECK(base > 0);
  const float units = std::min(scale / base, 2.0f);  // not finite if base is tiny
  if (!(units > 0)) {
    return 0;
  }
  const auto bits = std::bit_cast<std::uint32_t>(units);
  const std::uint32_t odd = bits >> kDroppedMantissaBits & 1;
  const std::uint32_t half = (1u << (kDroppedMantissaBits - 1)) - 1;
  const auto rounded = static_cast<std::int32_t>((bits + half + odd) >> kDroppedMantissaBits);
  return static_cast<std::uint8_t>(std::clamp(rounded - kExponentBias, 0, 255));
}

float byte_scale_base(float largest) {
  const float base = round_to_half(std::min(largest * (16.0f / 31.0f), kLargestHalf));
  return base > 0 ? base : 1.0f;
}

float byte_min(float scale, std::uint8_t z, int bits) {
  const int levels = (1 << bits) - 1;
  return 0.0f - scale * (static_cast<float>(z * levels) / 255.0f);
}

void byte_params(float base, int bits, const std::uint8_t* e, const std::uint8_t* z, std::size_t n,
                 float* scale, float* min) {
  for (std::size_t i = 0; i < n; ++i) {
    scale[i] = byte_scale(base, e[i]);
    min[i] = byte_min(scale[i], z[i], bits);
  }
}

void read_tiers(const BlockLayout& layout, const std::byte* block, std::uint32_t head,
                std::uint8_t* tiers) {
  const std::uint32_t n_tokens = layout.shape().n_tokens;
  std::fill_n(tiers, n_tokens, std::uint8_t{0});
  for (std::uint32_t p = 0; p < layout.n_tier_planes(); ++p) {
    const std::byte* plane = block + layout.tier_plane(head, p);
    for (std::uint32_t token = 0; token < n_tokens; ++token) {
      const unsigned bit = std::to_integer<unsigned>(plane[token / 8]) >> (token % 8) & 1u;
      tiers[token] |= static_cast<std::uint8_t>(bit << p);
    }
  }
}

void write_tiers(const BlockLayout& layout, std::byte* block, std::uint32_t head,
                 const std::uint8_t* tiers) {
  const std::uint32_t n_tokens = layout.shape().n_tokens;
  ZC_CHECK(std::all_of(tiers, tiers + n_tokens, [&](auto t) { return t < layout.n_tiers(); }));
  ZC_CHECK(has_layouts_counts(layout, {tiers, tiers + n_tokens}));
  for (std::uint32_t p = 0; p < layout.n_tier_planes(); ++p) {
    std::byte* plane = block + layout.tier_plane(head, p);
    std::fill_n(plane, (n_tokens + 63) / 64 * 8, std::byte{0});
    for (std::uint32_t token = 0; token < n_tokens; ++token) {
      plane[token / 8] |= static_cast<std::byte>((tiers[token] >> p & 1) << (token % 8));
    }
  }
}

void slot_order(const BlockLayout& layout, const std::byte* block, std::uint32_t head,
                std::uint32_t* order) {
  std::vector<std::uint8_t> tiers(layout.shape().n_tokens);
  read_tiers(layout, block, head, tiers.data());
  ZC_CHECK(has_layouts_counts(layout, tiers));
  std::array<std::uint32_t, 3> next_slot{};
  for (std::uint32_t tier = 1; tier < layout.n_tiers(); ++tier) {
    next_slot[tier] = next_slot[tier - 1] + layout.tier_tokens(tier - 1);
  }
  for (std::uint32_t token = 0; token < tiers.size(); ++token) {
    order[next_slot[tiers[token]]++] = token;
  }
}

void copy_tensor(const BlockLayout& from, const std::byte* block, const BlockLayout& to,
                 std::byte* out, Tensor t, std::uint32_t head) {
  ZC_CHECK(from.tensor(t) == to.tensor(t) && !from.tensor(t).slot_shared);
  ZC_CHECK(from.params_size(t) == to.params_size(t));
  for (int cls = 0; cls < from.tensor(t).n_classes; ++cls) {
    for (std::uint32_t group = 0; group < from.n_groups(t); ++group) {
      std::memcpy(out + to.codes(t, head, cls, group), block + from.codes(t, head, cls, group),
                  from.codes_size(t, cls, group));
    }
  }
  std::memcpy(out + to.params(t, head), block + from.params(t, head), from.params_size(t));
}

void channel_order(const BlockLayout& layout, const std::byte* block, Tensor t, std::uint32_t head,
                   std::uint16_t* order) {
  const std::uint32_t n_channels = layout.head_dim(t);
  if (layout.tensor(t).reordered) {
    std::memcpy(order, block + layout.channel_order(t, head), n_channels * sizeof(std::uint16_t));
  } else if (layout.tensor(t).wide_channels > 0) {
    const std::byte* mask = block + layout.wide_mask(t, head);
    for (const bool wide : {true, false}) {
      for (std::uint32_t c = 0; c < n_channels; ++c) {
        if (is_wide(mask, c) == wide) {
          *order++ = static_cast<std::uint16_t>(c);
        }
      }
    }
  } else {
    std::iota(order, order + n_channels, std::uint16_t{0});
  }
}

void write_wide_mask(const BlockLayout& layout, std::byte* block, Tensor t, std::uint32_t head,
                     const std::uint16_t* wide) {
  std::byte* mask = block + layout.wide_mask(t, head);
  std::fill_n(mask, layout.head_dim(t) / 8, std::byte{0});
  for (std::uint32_t i = 0; i < layout.tensor(t).wide_channels; ++i) {
    mask[wide[i] / 8] |= std::byte{1} << (wide[i] % 8);
  }
}

bool is_sound(const BlockLayout& layout, const std::byte* block) {
  std::vector<std::uint8_t> tiers(layout.shape().n_tokens);
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    read_tiers(layout, block, head, tiers.data());
    if (!has_layouts_counts(layout, tiers) || !is_sound_tensor(layout, block, Tensor::kKey, head) ||
        !is_sound_tensor(layout, block, Tensor::kValue, head)) {
      return false;
    }
  }
  return true;
}

}  // namespace zipcache::format
