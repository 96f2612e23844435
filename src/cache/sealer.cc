// What is sealed at the end of a step, and as what.
#include "cache/sealer.h"

#include <algorithm>
#include <limits>

#include "base/philox.h"

namespace zipcache::cache {

// The published code, too, ranks in decode by the current query alone, not normalized.
bool Sealer::keeps_last_row_only() const {
  const saliency::Metric metric = cache_.policy().metric;
  return metric == saliency::Metric::kLastToken ||
         (metric == saliency::Metric::kOfficial && cache_.newest_cells().size() == 1);
}

void Sealer::add_mass(const LayerCache::Slot& slot, const float* mass, const float* squares,
                      std::uint32_t seen) {
  if (seen == 0) {
    return;
  }
  StagingPage& page = *cache_.page(slot.segment);
  page.tokens[slot.index].seen += seen;
  for (std::uint32_t head = 0; head < cache_.n_kv_heads(); ++head) {
    const std::size_t at = std::size_t{slot.index} * cache_.n_kv_heads() + head;
    page.mass[at] = keeps_last_row_only() ? mass[head] : page.mass[at] + mass[head];
    if (squares != nullptr) {
      page.squares[at] += squares[head];
    }
  }
}

std::uint32_t Sealer::count_staged(std::uint32_t group) const {
  std::uint32_t n = 0;
  for (const Segment& segment : cache_.segments()) {
    const StagingPage* page = segment.page.get();
    for (std::uint32_t slot = 0; page != nullptr && slot < page->capacity(); ++slot) {
      n += page->cells[slot] != kNoCell && page->tokens[slot].group == group &&
           !page->tokens[slot].sink;
    }
  }
  return n;
}

Sealer::Slots Sealer::staged(std::uint32_t group) const {
  Slots slots;
  const auto& segments = cache_.segments();
  for (std::uint32_t id = 0; id < segments.size(); ++id) {
    const StagingPage* page = segments[id].page.get();
    for (std::uint32_t slot = 0; page != nullptr && slot < page->capacity(); ++slot) {
      if (page->cells[slot] != kNoCell && page->tokens[slot].group == group &&
          !page->tokens[slot].sink) {
        slots.push_back({id, slot});
      }
    }
  }
  std::sort(slots.begin(), slots.end(), [&](const auto& a, const auto& b) {
    return segments[a.segment].page->tokens[a.index].arrival <
           segments[b.segment].page->tokens[b.index].arrival;
  });
  return slots;
}

Status Sealer::end_step(TaskTeam* helpers) {
  helpers_ = helpers;
  for (const StepGroup& group : scratch_.groups) {
    Status sealed = cache_.policy().evicts ? evict_group(group) : seal_group(group);
    if (!sealed) {
      return sealed;
    }
  }
  cache_.settle_staging();
  cache_.compact_blocks();
  return ok_status();
}

Status Sealer::seal_group(const StepGroup& group) {
  const policy::Policy& policy = cache_.policy();
  const std::uint32_t n_staged = count_staged(group.id);
  const std::uint32_t n_tokens = find_group(group.id).n_tokens;
  const std::uint32_t n_held = policy::held_tokens(policy, n_tokens);
  if (n_staged <= n_held) {
    return seal_held_values(group.id);
  }
  // The sooner end of a chunk is for sequences that have blocks: there is nothing to gain before.
  if (!policy.seal_chunks && n_tokens < policy.sink_tokens + policy.seal_tokens &&
      n_staged - n_held < policy.seal_tokens) {
    return seal_held_values(group.id);
  }
  const std::uint32_t n_due = n_staged - n_held;
  if (policy.append_tokens > 0 && n_due <= policy.seal_tokens &&
      n_due >= policy::append_tokens(policy, n_tokens)) {
    Slots slots = staged(group.id);
    slots.resize(n_due);
    if (const auto joins = block_to_join(group.id, slots)) {
      return cache_.append(joins->segment, slots, joins->added, n_tokens - n_held,
                           rank(slots, n_held, format::BlockLayout(joins->added)), helpers_);
    }
  }
  const std::vector<std::uint32_t> blocks = policy::plan_seal(policy, n_due, group.n_rows);
  if (blocks.empty()) {
    return seal_held_values(group.id);
  }
  const Slots slots = staged(group.id);
  balance_keys(find_group(group.id), slots);
  std::size_t begin = 0;
  for (const std::uint32_t n : blocks) {
    Status sealed = seal_block(std::span(slots).subspan(begin, n),
                               static_cast<std::uint32_t>(slots.size() - begin - n), group.id);
    if (!sealed) {
      return sealed;
    }
    begin += n;
  }
  return seal_held_values(group.id);
}

std::optional<Sealer::Joins> Sealer::block_to_join(std::uint32_t group,
                                                   std::span<const LayerCache::Slot> slots) {
  const SealedBlock* newest = nullptr;
  Joins joins{};
  for (std::uint32_t id = 0; id < cache_.segments().size(); ++id) {
    const SealedBlock* block = cache_.segments()[id].block.get();
    if (block != nullptr && block->group == group &&
        (newest == nullptr || block->end_ordinal > newest->end_ordinal)) {
      newest = block;
      joins.segment = id;
    }
  }
  const auto n = static_cast<std::uint32_t>(slots.size());
  if (newest == nullptr || newest->n_live != newest->n_tokens() || newest->holds_values ||
      !newest->mass.empty() || newest->n_tokens() + n > cache_.policy().append_limit) {
    return std::nullopt;
  }
  const std::uint32_t last_cell = newest->cell(newest->n_tokens() - 1);
  const bool behind = std::all_of(slots.begin(), slots.end(), [&](const LayerCache::Slot& slot) {
    return cache_.page(slot.segment)->cells[slot.index] > last_cell;
  });
  const auto added = policy::added_shape(cache_.policy(), newest->layout->shape(), n);
  if (!behind || !added) {
    return std::nullopt;
  }
  joins.added = *added;
  return joins;
}

// Values that have left the window for which they stay exact.
Status Sealer::seal_held_values(std::uint32_t group) {
  const policy::Policy& policy = cache_.policy();
  if (policy.value_hold_tokens == 0) {
    return ok_status();
  }
  const std::uint32_t n_tokens = find_group(group).n_tokens;
  for (std::uint32_t id = 0; id < cache_.segments().size(); ++id) {
    const SealedBlock* block = cache_.segments()[id].block.get();
    if (block == nullptr || block->group != group || !block->holds_values ||
        n_tokens - block->end_ordinal < policy.value_hold_tokens) {
      continue;
    }
    const format::BlockShape shape = policy::block_shape(
        policy, block->n_tokens(), cache_.n_kv_heads(), cache_.key_dim(), cache_.value_dim());
    Status sealed = cache_.seal_values(id, shape.value);
    if (!sealed) {
      return sealed;
    }
  }
  return ok_status();
}

// For Metric::kRandom: another order in every layer, head and block.
std::uint64_t Sealer::random_seed(const LayerCache::Slot& first, std::uint32_t head) {
  Philox random(cache_.policy().seed, cache_.shape().layer, token(first).arrival);
  return std::uint64_t{random.next()} << 32 | head;
}

// Tokens are ranked in the order of arrival (ties go to the older one), head by head.
std::vector<std::uint8_t> Sealer::rank(std::span<const LayerCache::Slot> oldest_first,
                                       std::uint32_t n_after, const format::BlockLayout& layout) {
  const policy::Policy& policy = cache_.policy();
  const std::uint32_t n_heads = cache_.n_kv_heads();
  const auto n = static_cast<std::uint32_t>(oldest_first.size());
  std::vector<std::uint8_t> tiers(std::size_t{n_heads} * n);
  if (layout.n_tiers() == 1) {
    return tiers;
  }
  std::vector<std::uint32_t> tier_tokens;
  for (std::uint32_t tier = 0; tier < layout.n_tiers(); ++tier) {
    tier_tokens.push_back(layout.tier_tokens(tier));
  }
  std::vector<float> mass(n), squares(needs_squares() ? n : 0), scores(n);
  std::vector<std::uint32_t> seen(n), ages(n);
  const auto n_recent = static_cast<std::uint32_t>(std::uint64_t{n} * policy.recent_bp / 10000);
  for (std::uint32_t head = 0; head < n_heads; ++head) {
    for (std::uint32_t i = 0; i < n; ++i) {
      const StagingPage& page = *cache_.page(oldest_first[i].segment);
      const std::size_t at = std::size_t{oldest_first[i].index} * n_heads + head;
      mass[i] = page.mass[at];
      if (needs_squares()) {
        squares[i] = page.squares[at];
      }
      seen[i] = page.tokens[oldest_first[i].index].seen;
      ages[i] = n_after + n - i;
    }
    saliency::token_scores(keeps_last_row_only() ? saliency::Metric::kLastToken : policy.metric,
                           {mass, squares, seen, ages}, random_seed(oldest_first.front(), head),
                           scores);
    for (std::uint32_t i = n - n_recent; i < n; ++i) {
      scores[i] = std::numeric_limits<float>::infinity();
    }
    saliency::assign_tiers(scores, tier_tokens, std::span(tiers).subspan(std::size_t{head} * n, n));
  }
  return tiers;
}

Status Sealer::seal_block(std::span<const LayerCache::Slot> oldest_first, std::uint32_t n_after,
                          std::uint32_t group) {
  const policy::Policy& policy = cache_.policy();
  const std::uint32_t n_heads = cache_.n_kv_heads();
  const auto n = static_cast<std::uint32_t>(oldest_first.size());

  const bool holds_values = n_after < policy.value_hold_tokens;
  format::BlockShape shape =
      policy::block_shape(policy, n, n_heads, cache_.key_dim(), cache_.value_dim(), holds_values);
  std::vector<std::uint8_t> tiers = rank(oldest_first, n_after, format::BlockLayout(shape));
  Slots slots(oldest_first.begin(), oldest_first.end());
  if (policy.requantize_all) {
    Status gathered = gather_sealed(group, &shape, &slots, &tiers);
    if (!gathered) {
      return gathered;
    }
  }
  const TokenGroup& of = find_group(group);
  const std::vector<float> weights = channel_weights(of);
  return cache_.seal(slots,
                     {.shape = shape,
                      .group = group,
                      .end_ordinal = of.n_tokens - n_after,
                      .holds_values = holds_values,
                      .key_factors = of.key_factors,
                      .key_weights = weights},
                     tiers, helpers_);
}

// Published mode: every sealed token of the group comes back, keeps its tier, and is quantized anew
// together with the new ones.
Status Sealer::gather_sealed(std::uint32_t group, format::BlockShape* shape, Slots* slots,
                             std::vector<std::uint8_t>* tiers) {
  const std::uint32_t n_heads = cache_.n_kv_heads();
  for (std::uint32_t id = 0; id < cache_.segments().size(); ++id) {
    const SealedBlock* block = cache_.segments()[id].block.get();
    // A block with overwritten tokens has lost the counts that all heads must share: it stays.
    if (block == nullptr || block->group != group || block->n_live != block->n_tokens()) {
      continue;
    }
    const format::BlockShape old = block->layout->shape();
    std::vector<std::uint8_t> old_tiers;
    Expected<Slots> unsealed = cache_.unseal(id, &old_tiers);
    if (!unsealed) {
      return unsealed.error();
    }
    const std::size_t n_new = slots->size();
    std::vector<std::uint8_t> joined;
    for (std::uint32_t head = 0; head < n_heads; ++head) {
      const auto old_head = old_tiers.begin() + head * old.n_tokens;
      const auto new_head = tiers->begin() + static_cast<std::ptrdiff_t>(head * n_new);
      joined.insert(joined.end(), old_head, old_head + old.n_tokens);
      joined.insert(joined.end(), new_head, new_head + static_cast<std::ptrdiff_t>(n_new));
    }
    *tiers = std::move(joined);
    slots->insert(slots->begin(), unsealed->begin(), unsealed->end());
    shape->n_tokens += old.n_tokens;
    shape->key.class0_tokens += old.key.class0_tokens;
    shape->value.class0_tokens += old.value.class0_tokens;
  }
  return ok_status();
}

}  // namespace zipcache::cache
