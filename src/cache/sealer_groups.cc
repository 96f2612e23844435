// Which sequence the new tokens of a step belong to, and which of its rows are probes.
#include <algorithm>

#include "base/check.h"
#include "cache/sealer.h"

namespace zipcache::cache {

StagedToken& Sealer::token(const LayerCache::Slot& slot) {
  return cache_.page(slot.segment)->tokens[slot.index];
}

bool Sealer::holds_tail(const TokenGroup& group) const {
  const LayerCache::Slot slot = cache_.find(group.tail_cell);
  if (!slot.found()) {
    return false;
  }
  const Segment& segment = cache_.segments()[slot.segment];
  return (segment.page != nullptr ? segment.page->tokens[slot.index].group
                                  : segment.block->group) == group.id;
}

TokenGroup& Sealer::find_group(std::uint32_t id) {
  const auto found = std::find_if(cache_.groups_.begin(), cache_.groups_.end(),
                                  [id](const TokenGroup& g) { return g.id == id; });
  ZC_CHECK(found != cache_.groups_.end());
  return *found;
}

TokenGroup& Sealer::group_for(const Visibility& visible, std::uint32_t row) {
  // The latest group comes first: the next token of the same sequence finds it at once.
  auto& groups = cache_.groups_;
  for (std::size_t i = groups.size(); i-- > 0;) {
    if (visible.sees(row, groups[i].tail_cell) && holds_tail(groups[i])) {
      std::rotate(groups.begin() + static_cast<std::ptrdiff_t>(i),
                  groups.begin() + static_cast<std::ptrdiff_t>(i) + 1, groups.end());
      return groups.back();
    }
  }
  return take_over(visible, row);
}

TokenGroup& Sealer::take_over(const Visibility& visible, std::uint32_t row) {
  auto& groups = cache_.groups_;
  std::erase_if(groups, [this](const TokenGroup& group) { return !holds_tail(group); });

  // Staged tokens that this row sees: of the group of the newest of them, or restored ones that
  // belong to no group yet. The tokens of this very step have no group either, but are newer.
  const std::uint32_t step_begin =
      cache_.next_arrival_ - static_cast<std::uint32_t>(cache_.newest_cells().size());
  Slots seen;
  for (std::uint32_t id = 0; id < cache_.segments().size(); ++id) {
    const StagingPage* page = cache_.segments()[id].page.get();
    for (std::uint32_t slot = 0; page != nullptr && slot < page->capacity(); ++slot) {
      if (page->cells[slot] != kNoCell && page->tokens[slot].arrival < step_begin &&
          visible.sees(row, page->cells[slot])) {
        seen.push_back({id, slot});
      }
    }
  }
  std::sort(seen.begin(), seen.end(),
            [this](const auto& a, const auto& b) { return token(a).arrival < token(b).arrival; });
  TokenGroup made{.id = cache_.next_group_++};
  if (!seen.empty() && token(seen.back()).group != kNoGroup) {
    const auto parent = std::find_if(groups.begin(), groups.end(), [&](const TokenGroup& group) {
      return group.id == token(seen.back()).group;
    });
    made.n_tokens = parent == groups.end() ? cache_.policy().sink_tokens : parent->n_tokens;
    if (parent != groups.end()) {
      made.query_max = parent->query_max;
      made.key_factors = parent->key_factors;
      made.query_power = parent->query_power;
    }
  }
  for (const LayerCache::Slot& slot : seen) {
    if (token(slot).group == kNoGroup) {  // restored: its place in the sequence starts here
      token(slot).sink = made.n_tokens++ < cache_.policy().sink_tokens;
    }
    token(slot).group = made.id;
  }
  // Blocks that wait for their values to be quantized go on waiting in the new group.
  for (const Segment& segment : cache_.segments()) {
    if (segment.block != nullptr && (segment.block->holds_values || !segment.block->mass.empty()) &&
        visible.sees(row, segment.block->cell(segment.block->n_tokens() - 1))) {
      segment.block->group = made.id;
    }
  }
  groups.push_back(made);
  return groups.back();
}

void Sealer::begin_step(const Visibility& visible, std::uint32_t first_row,
                        std::vector<Probe>* probes) {
  auto& groups = scratch_.groups;
  groups.clear();
  scratch_.group_of_row.clear();
  const auto cells = cache_.newest_cells();
  for (std::uint32_t row = 0; row < cells.size(); ++row) {
    const LayerCache::Slot slot = cache_.find(cells[row]);
    ZC_CHECK(slot.found());
    TokenGroup& group = group_for(visible, first_row + row);
    auto step = std::find_if(groups.begin(), groups.end(),
                             [&](const StepGroup& g) { return g.id == group.id; });
    if (step == groups.end()) {
      step = groups.insert(step, {group.id, group.n_tokens, 0, 0});
    }
    ++step->n_rows;
    scratch_.group_of_row.push_back(static_cast<std::uint32_t>(step - groups.begin()));
    token(slot).group = group.id;
    token(slot).sink = group.n_tokens < cache_.policy().sink_tokens;
    ++group.n_tokens;
    group.tail_cell = cells[row];
  }
  choose_probes(probes);
}

void Sealer::choose_probes(std::vector<Probe>* probes) {
  const auto n_rows = static_cast<std::uint32_t>(scratch_.group_of_row.size());
  scratch_.rows.clear();
  scratch_.weights.assign(n_rows, 0.0f);
  for (std::uint32_t index = 0; index < scratch_.groups.size(); ++index) {
    StepGroup& group = scratch_.groups[index];
    group.first_row = static_cast<std::uint32_t>(scratch_.rows.size());
    for (std::uint32_t row = 0; row < n_rows; ++row) {
      if (scratch_.group_of_row[row] == index) {
        scratch_.rows.push_back(row);
      }
    }
    saliency::select_probes(cache_.policy().probes, group.n_rows,
                            {cache_.policy().seed, cache_.shape().layer, group.ordinal,
                             cache_.policy().probe_positions},
                            &scratch_.chosen);
    for (const std::uint32_t i : scratch_.chosen) {
      scratch_.weights[scratch_.rows[group.first_row + i]] += 1.0f;
    }
  }
  probes->clear();
  for (std::uint32_t row = 0; row < n_rows; ++row) {
    if (scratch_.weights[row] > 0.0f) {
      probes->push_back({row, scratch_.weights[row]});
    }
  }
}

}  // namespace zipcache::cache
