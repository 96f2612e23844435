// Eviction (H2O): the sealed tokens of a group and those that leave the window of the newest are
// ranked together by the attention they received so far, head by head; the best are kept.
#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "cache/sealer.h"

namespace zipcache::cache {
namespace {

constexpr float kEvictedScore = -1.0f;  // below every attention

std::uint32_t share_of(std::uint32_t n, std::uint32_t basis_points) {
  return static_cast<std::uint32_t>(std::uint64_t{n} * basis_points / 10000);
}

}  // namespace

Status Sealer::evict_group(const StepGroup& group) {
  const policy::Policy& policy = cache_.policy();
  const std::uint32_t n_heads = cache_.n_kv_heads();
  const std::uint32_t n_so_far = find_group(group.id).n_tokens;
  Slots leaving = staged(group.id);
  const std::size_t n_held = policy::held_tokens(policy, n_so_far);
  if (leaving.size() < n_held + policy.seal_tokens) {
    return ok_status();
  }
  leaving.resize(leaving.size() - n_held);

  // scores[token][head]; every head has kept as many tokens as every other.
  Slots slots;
  std::vector<float> scores;
  std::uint32_t n_kept = 0;
  for (std::uint32_t id = 0; id < cache_.segments().size(); ++id) {
    const SealedBlock* block = cache_.segments()[id].block.get();
    // A block with overwritten tokens has lost the counts that all heads must share: it stays.
    if (block == nullptr || block->group != group.id || block->n_live != block->n_tokens()) {
      continue;
    }
    const std::uint32_t n = block->n_tokens(), n_slots = block->mass_slots();
    const std::size_t first = scores.size();
    scores.resize(first + std::size_t{n} * n_heads, kEvictedScore);
    std::vector<std::uint32_t> order(n);
    for (std::uint32_t head = 0; head < n_heads; ++head) {
      format::slot_order(*block->layout, block->bytes.data(), head, order.data());
      for (std::uint32_t slot = 0; slot < n_slots; ++slot) {
        scores[first + std::size_t{order[slot]} * n_heads + head] =
            block->mass[std::size_t{head} * n_slots + slot];
      }
    }
    n_kept += n_slots;
    std::vector<std::uint8_t> tiers;
    Expected<Slots> unsealed = cache_.unseal(id, &tiers);
    if (!unsealed) {
      return unsealed.error();
    }
    slots.insert(slots.end(), unsealed->begin(), unsealed->end());
  }
  for (const LayerCache::Slot& slot : leaving) {
    const float* mass = cache_.page(slot.segment)->mass.data() + std::size_t{slot.index} * n_heads;
    scores.insert(scores.end(), mass, mass + n_heads);
    slots.push_back(slot);
    ++n_kept;
  }
  n_kept = std::min(n_kept, share_of(n_so_far, policy.key.salient_bp));

  const auto n = static_cast<std::uint32_t>(slots.size());
  std::vector<std::uint8_t> tiers(std::size_t{n_heads} * n, 1);
  std::vector<float> of_head(n);
  for (std::uint32_t head = 0; head < n_heads; ++head) {
    for (std::uint32_t token = 0; token < n; ++token) {
      of_head[token] = scores[std::size_t{token} * n_heads + head];
    }
    saliency::assign_tiers(of_head, std::vector<std::uint32_t>{n_kept, n - n_kept},
                           std::span(tiers).subspan(std::size_t{head} * n, n));
  }

  // Tokens that no head keeps leave the cache; the others become one block.
  Slots kept;
  std::vector<std::uint32_t> kept_tokens;
  for (std::uint32_t token = 0; token < n; ++token) {
    bool is_kept = false;
    for (std::uint32_t head = 0; head < n_heads; ++head) {
      is_kept = is_kept || tiers[std::size_t{head} * n + token] == 0;
    }
    if (is_kept) {
      kept.push_back(slots[token]);
      kept_tokens.push_back(token);
    } else {
      cache_.evict(slots[token]);
    }
  }
  Status sealed = ok_status();
  if (!kept.empty()) {
    // Mass goes by slot: class 0 in the order of the block's tokens, which is that of cells.
    std::vector<std::uint32_t> by_cell(kept.size());
    std::iota(by_cell.begin(), by_cell.end(), 0u);
    const auto cell_of = [&](std::uint32_t i) {
      return cache_.page(kept[i].segment)->cells[kept[i].index];
    };
    std::sort(by_cell.begin(), by_cell.end(),
              [&](std::uint32_t a, std::uint32_t b) { return cell_of(a) < cell_of(b); });
    std::vector<std::uint8_t> kept_tiers;
    std::vector<float> mass;
    for (std::uint32_t head = 0; head < n_heads; ++head) {
      for (const std::uint32_t token : kept_tokens) {
        kept_tiers.push_back(tiers[std::size_t{head} * n + token]);
      }
      for (const std::uint32_t i : by_cell) {
        if (tiers[std::size_t{head} * n + kept_tokens[i]] == 0) {
          mass.push_back(scores[std::size_t{kept_tokens[i]} * n_heads + head]);
        }
      }
    }
    format::BlockShape shape = policy::block_shape(policy, static_cast<std::uint32_t>(kept.size()),
                                                   n_heads, cache_.key_dim(), cache_.value_dim());
    shape.key.class0_tokens = shape.value.class0_tokens = n_kept;
    sealed = cache_.seal(kept, {.shape = shape, .group = group.id, .mass = std::move(mass)},
                         kept_tiers, helpers_);
  }
  return sealed;
}

}  // namespace zipcache::cache
