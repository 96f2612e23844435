#include "format/block_subset.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "base/check.h"
#include "format/slot_copy.h"

namespace zipcache::format {
namespace {

using Counts = std::array<std::uint32_t, 3>;

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
std::vector<SourceSlots> chosen_slots(const BlockLayout& layout, const std::byte* block,
                                      std::uint32_t head, const std::vector<bool>& kept,
                                      const Counts& sizes) {
  std::vector<std::uint32_t> order(layout.shape().n_tokens);
  slot_order(layout, block, head, order.data());
  std::vector<SourceSlots> slots;
  std::uint32_t begin = 0;
  for (std::uint32_t tier = 0; tier < layout.n_tiers(); ++tier) {
    const std::uint32_t end = begin + layout.tier_tokens(tier);
    const std::size_t wanted = slots.size() + sizes[tier];
    for (const bool keep : {true, false}) {
      for (std::uint32_t slot = begin; slot < end && slots.size() < wanted; ++slot) {
        if (kept[order[slot]] == keep) {
          slots.push_back({.first = slot, .n = 1});
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

}  // namespace

std::optional<BlockShape> subset_shape(const BlockLayout& layout, const std::byte* block,
                                       const std::vector<bool>& kept) {
  BlockShape shape = layout.shape();
  ZC_CHECK(kept.size() == shape.n_tokens);
  ZC_CHECK(std::find(kept.begin(), kept.end(), true) != kept.end());
  if (!can_be_taken_apart(shape)) {
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
    const std::vector<SourceSlots> runs = chosen_slots(layout, block, head, kept, sizes);
    const Source source{&layout, block};
    copy_head({&source, 1}, runs, to, out, head);
    const std::vector<std::uint8_t> tiers = chosen_tiers(layout, block, head, kept, sizes);
    write_tiers(to, out, head, tiers.data());
  }
}

}  // namespace zipcache::format
