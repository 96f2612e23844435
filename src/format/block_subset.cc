#include "format/block_subset.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <span>

#include "base/check.h"

namespace zipcache::format {
namespace {

using Counts = std::array<std::uint32_t, 3>;
constexpr std::array kTensors{Tensor::kKey, Tensor::kValue};

bool can_be_taken_apart(const TensorFormat& f) {
  return !f.slot_shared && f.group_tokens == 0 && f.rank == 0 && f.outliers == 0 && !f.reordered &&
         is_code_width(f.bits[0]) && (f.n_classes == 1 || is_code_width(f.bits[1]));
}

// Of each tier, the tokens that a head keeps; the most over all heads.
Counts tier_sizes(const BlockLayout& layout, const std::byte* block,
                  const std::vector<bool>& kept) {
  Counts most{};
  std::vector<std::uint8_t> tiers(layout.shape().n_tokens);
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    read_tiers(layout, block, head, tiers.data());
    Counts counts{};
    for (std::size_t token = 0; token < tiers.size(); ++token) {
      counts[tiers[token]] += kept[token] ? 1 : 0;
    }
    for (std::size_t tier = 0; tier < most.size(); ++tier) {
      most[tier] = std::max(most[tier], counts[tier]);
    }
  }
  return most;
}

// Old slots of a head in the order of the new ones, tier by tier: kept tokens, then fillers.
std::vector<std::uint32_t> chosen_slots(const BlockLayout& layout, const std::byte* block,
                                        std::uint32_t head, const std::vector<bool>& kept,
                                        const Counts& sizes) {
  std::vector<std::uint32_t> order(layout.shape().n_tokens);
  slot_order(layout, block, head, order.data());
  std::vector<std::uint32_t> slots;
  std::uint32_t begin = 0;
  for (std::uint32_t tier = 0; tier < layout.n_tiers(); ++tier) {
    const std::uint32_t end = begin + layout.tier_tokens(tier);
    const std::size_t wanted = slots.size() + sizes[tier];
    for (const bool keep : {true, false}) {
      for (std::uint32_t slot = begin; slot < end && slots.size() < wanted; ++slot) {
        if (kept[order[slot]] == keep) {
          slots.push_back(slot);
        }
      }
    }
    begin = end;
  }
  return slots;
}

// Tiers of the smaller block's tokens in a head. Its empty tiers do not exist: they are skipped in
// the count.
std::vector<std::uint8_t> chosen_tiers(const BlockLayout& layout, const std::byte* block,
                                       std::uint32_t head, const std::vector<bool>& kept,
                                       const Counts& sizes) {
  std::vector<std::uint8_t> old(layout.shape().n_tokens), tiers;
  read_tiers(layout, block, head, old.data());
  Counts left = sizes, renumbered{};
  for (std::size_t tier = 1; tier < renumbered.size(); ++tier) {
    renumbered[tier] = renumbered[tier - 1] + (sizes[tier - 1] > 0 ? 1 : 0);
  }
  for (std::size_t token = 0; token < old.size(); ++token) {
    if (kept[token]) {
      tiers.push_back(static_cast<std::uint8_t>(renumbered[old[token]]));
      --left[old[token]];
    }
  }
  for (std::size_t tier = 0; tier < left.size(); ++tier) {
    tiers.insert(tiers.end(), left[tier], static_cast<std::uint8_t>(renumbered[tier]));
  }
  return tiers;
}

void copy_bytes(const std::byte* from, std::byte* to, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}

// One matrix of codes: `slots` are its old tokens, counted from the class's first.
void copy_codes(const BlockLayout& layout, const std::byte* block, const BlockLayout& to,
                std::byte* out, Tensor t, std::uint32_t head, int cls, std::uint32_t group,
                std::span<const std::uint32_t> slots) {
  const int bits = layout.code_bits(t, cls, group);
  const std::size_t channels = layout.group_channels(t, group);
  const std::size_t n_old = layout.class_tokens(t, cls), n_new = slots.size();
  const bool tokens_are_lanes = t == Tensor::kKey;
  std::vector<std::uint8_t> old(n_old * channels), chosen(n_new * channels);
  const auto lanes = [&](std::size_t n) { return tokens_are_lanes ? n : channels; };
  const auto inner = [&](std::size_t n) { return tokens_are_lanes ? channels : n; };
  unpack_codes(bits, lanes(n_old), inner(n_old),
               {block + layout.codes(t, head, cls, group), layout.codes_size(t, cls, group)}, old);
  for (std::size_t token = 0; token < n_new; ++token) {
    for (std::size_t channel = 0; channel < channels; ++channel) {
      const auto at = [&](std::size_t n, std::size_t index) {
        return tokens_are_lanes ? index * channels + channel : channel * n + index;
      };
      chosen[at(n_new, token)] = old[at(n_old, slots[token])];
    }
  }
  pack_codes(bits, lanes(n_new), inner(n_new), chosen,
             {out + to.codes(t, head, cls, group), to.codes_size(t, cls, group)});
}

// Two planes, one number per slot in each.
void copy_token_params(const BlockLayout& layout, const std::byte* block, const BlockLayout& to,
                       std::byte* out, Tensor t, std::uint32_t head, std::uint32_t group,
                       std::span<const std::uint32_t> slots) {
  const std::size_t size = layout.tensor(t).token_params == TokenParams::kHalf ? sizeof(Half) : 1;
  const std::byte* from = block + layout.token_scale_min(t, head, group);
  std::byte* next = out + to.token_scale_min(t, head, group);
  for (const std::size_t plane : {0, 1}) {
    for (const std::uint32_t slot : slots) {
      copy_bytes(from + (plane * layout.shape().n_tokens + slot) * size, next, size);
      next += size;
    }
  }
}

void copy_channel_params(const BlockLayout& layout, const std::byte* block, const BlockLayout& to,
                         std::byte* out, Tensor t, std::uint32_t head) {
  const TensorFormat& format = layout.tensor(t);
  for (int cls = 0; cls < format.n_classes; ++cls) {
    const std::size_t half_plane = layout.head_dim(t) * sizeof(Half);
    if (format.granularity == Granularity::kChannelwise && to.class_tokens(t, cls) > 0) {
      copy_bytes(block + layout.channel_scale_min(t, head, cls),
                 out + to.channel_scale_min(t, head, cls), 2 * half_plane);
    } else if (format.granularity == Granularity::kChannelSeparable) {
      copy_bytes(block + layout.channel_factor(t, head, cls), out + to.channel_factor(t, head, cls),
                 half_plane);
    }
  }
  if (format.wide_channels > 0) {
    copy_bytes(block + layout.wide_mask(t, head), out + to.wide_mask(t, head),
               layout.head_dim(t) / 8);
  }
  if (format.token_params == TokenParams::kByte) {
    copy_bytes(block + layout.token_base(t, head), out + to.token_base(t, head),
               format.n_classes * sizeof(Half));
  }
}

}  // namespace

std::optional<BlockShape> subset_shape(const BlockLayout& layout, const std::byte* block,
                                       const std::vector<bool>& kept) {
  BlockShape shape = layout.shape();
  ZC_CHECK(kept.size() == shape.n_tokens);
  ZC_CHECK(std::find(kept.begin(), kept.end(), true) != kept.end());
  if (!can_be_taken_apart(shape.key) || !can_be_taken_apart(shape.value)) {
    return std::nullopt;
  }
  const Counts sizes = tier_sizes(layout, block, kept);
  shape.n_tokens = std::accumulate(sizes.begin(), sizes.end(), 0u);
  if (shape.n_tokens >= layout.shape().n_tokens) {
    return std::nullopt;
  }
  for (TensorFormat* format : {&shape.key, &shape.value}) {
    if (format->n_classes < 2) {
      continue;
    }
    const std::uint32_t border = format->class0_tokens;
    format->class0_tokens = 0;
    std::uint32_t begin = 0;
    for (std::uint32_t tier = 0; tier < layout.n_tiers() && begin < border; ++tier) {
      format->class0_tokens += sizes[tier];
      begin += layout.tier_tokens(tier);
    }
  }
  return shape;
}

void copy_subset(const BlockLayout& layout, const std::byte* block, const std::vector<bool>& kept,
                 const BlockLayout& to, std::byte* out) {
  const Counts sizes = tier_sizes(layout, block, kept);
  std::fill_n(out, to.total_bytes(), std::byte{0});
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    const std::vector<std::uint32_t> slots = chosen_slots(layout, block, head, kept, sizes);
    ZC_CHECK(slots.size() == to.shape().n_tokens);
    for (const Tensor t : kTensors) {
      copy_channel_params(layout, block, to, out, t, head);
      for (std::uint32_t group = 0; group < layout.n_groups(t); ++group) {
        for (int cls = 0; cls < layout.tensor(t).n_classes; ++cls) {
          std::vector<std::uint32_t> of_class(
              slots.begin() + to.first_slot(t, cls),
              slots.begin() + to.first_slot(t, cls) + to.class_tokens(t, cls));
          for (std::uint32_t& slot : of_class) {
            slot -= layout.first_slot(t, cls);
          }
          copy_codes(layout, block, to, out, t, head, cls, group, of_class);
        }
        if (layout.tensor(t).granularity != Granularity::kChannelwise) {
          copy_token_params(layout, block, to, out, t, head, group, slots);
        }
      }
    }
    const std::vector<std::uint8_t> tiers = chosen_tiers(layout, block, head, kept, sizes);
    write_tiers(to, out, head, tiers.data());
  }
}

}  // namespace zipcache::format
