#include "format/block_join.h"

#include <algorithm>
#include <array>
#include <vector>

#include "format/slot_copy.h"

namespace zipcache::format {
namespace {

std::uint32_t class0_tokens(const BlockShape& shape, Tensor t) {
  const TensorFormat& f = t == Tensor::kKey ? shape.key : shape.value;
  return f.n_classes == 1 ? shape.n_tokens : f.class0_tokens;
}

// The tier of `to` that the slots of a tier of `from` belong to: the class borders before them.
std::uint8_t joined_tier(const BlockLayout& from, std::uint32_t first_slot, const BlockLayout& to) {
  const std::uint32_t n = to.shape().n_tokens;
  std::uint8_t tier = 0;
  std::uint32_t last_border = 0;
  for (const Tensor t : kTensors) {
    const std::uint32_t border = class0_tokens(to.shape(), t);
    const bool parts = border > 0 && border < n && border != last_border;
    tier += parts && first_slot >= class0_tokens(from.shape(), t) ? 1 : 0;
    last_border = border;
  }
  return tier;
}

}  // namespace

std::optional<BlockShape> joined_shape(const BlockShape& first, const BlockShape& second) {
  BlockShape shape = first, same = second;
  same.n_tokens = first.n_tokens;
  same.key.class0_tokens = first.key.class0_tokens;
  same.value.class0_tokens = first.value.class0_tokens;
  if (!(same == first) || !can_be_taken_apart(first)) {
    return std::nullopt;
  }
  for (const Tensor t : kTensors) {
    const std::uint32_t old0 = class0_tokens(first, t), new0 = class0_tokens(second, t);
    if ((old0 == 0 && new0 > 0) || (old0 == first.n_tokens && new0 < second.n_tokens)) {
      return std::nullopt;
    }
  }
  const auto keys_within = [](const BlockShape& s) {
    return class0_tokens(s, Tensor::kKey) <= class0_tokens(s, Tensor::kValue);
  };
  const auto values_within = [](const BlockShape& s) {
    return class0_tokens(s, Tensor::kKey) >= class0_tokens(s, Tensor::kValue);
  };
  if (!(keys_within(first) && keys_within(second)) &&
      !(values_within(first) && values_within(second))) {
    return std::nullopt;
  }
  shape.n_tokens += second.n_tokens;
  shape.key.class0_tokens += second.key.class0_tokens;
  shape.value.class0_tokens += second.value.class0_tokens;
  return shape;
}

void join_blocks(const BlockLayout& first, const std::byte* first_block, const BlockLayout& second,
                 const std::byte* second_block, const BlockLayout& to, std::byte* out) {
  const std::array<Source, 2> sources{{{&first, first_block}, {&second, second_block}}};
  std::fill_n(out, to.total_bytes(), std::byte{0});
  std::vector<SourceSlots> runs;
  std::array<std::array<std::uint8_t, 3>, 2> tier_of{};  // [source][its tier]
  std::array<std::vector<SourceSlots>, 3> of_tier;
  for (std::uint32_t s = 0; s < sources.size(); ++s) {
    std::uint32_t slot = 0;
    for (std::uint32_t tier = 0; tier < sources[s].layout->n_tiers(); ++tier) {
      const std::uint32_t n = sources[s].layout->tier_tokens(tier);
      tier_of[s][tier] = joined_tier(*sources[s].layout, slot, to);
      of_tier[tier_of[s][tier]].push_back({s, slot, n});
      slot += n;
    }
  }
  for (const auto& tier : of_tier) {
    runs.insert(runs.end(), tier.begin(), tier.end());
  }
  std::vector<std::uint8_t> tiers(to.shape().n_tokens);
  for (std::uint32_t head = 0; head < to.shape().n_kv_heads; ++head) {
    copy_head(sources, runs, to, out, head);
    std::uint8_t* next = tiers.data();
    for (std::uint32_t s = 0; s < sources.size(); ++s) {
      const std::uint32_t n = sources[s].layout->shape().n_tokens;
      read_tiers(*sources[s].layout, sources[s].block, head, next);
      std::transform(next, next + n, next, [&](std::uint8_t tier) { return tier_of[s][tier]; });
      next += n;
    }
    write_tiers(to, out, head, tiers.data());
  }
}

}  // namespace zipcache::format
