// Staged tokens into blocks and back.
#include <algorithm>
#include <new>
#include <numeric>

#include "base/check.h"
#include "cache/errors.h"
#include "cache/layer_cache.h"
#include "format/block_join.h"
#include "format/block_subset.h"
#include "quant/block_codec.h"

namespace zipcache::cache {

// Staged tokens in ascending cells, out of their pages.
LayerCache::Gathered LayerCache::gather(std::span<const Slot> slots,
                                        std::span<const std::uint8_t> tiers, TaskTeam* team) const {
  const std::size_t n = slots.size();
  const auto cell_of = [this](const Slot& slot) {
    return segments_[slot.segment].page->cells[slot.index];
  };
  std::vector<std::uint32_t> order(n);  // token of the block -> slots[]
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return cell_of(slots[a]) < cell_of(slots[b]);
  });
  Gathered out;
  out.n_keys = n * shape_.key_row;
  out.n_values = n * shape_.value_row;
  out.keys = std::make_unique_for_overwrite<float[]>(out.n_keys);
  out.values = std::make_unique_for_overwrite<float[]>(out.n_values);
  out.cells.resize(n);
  out.tiers.resize(tiers.size());
  for (std::size_t token = 0; token < n; ++token) {
    out.cells[token] = cell_of(slots[order[token]]);
    for (std::size_t head = 0; head * n < tiers.size(); ++head) {
      out.tiers[head * n + token] = tiers[head * n + order[token]];
    }
  }
  read_staged(slots, order, out.keys.get(), out.values.get(), team);
  return out;
}

// From staging into a block: they are sealed now.
void LayerCache::move_cells(std::span<const std::uint32_t> cells, std::uint32_t segment) {
  for (const std::uint32_t cell : cells) {
    release(cell);
  }
  for (const std::uint32_t cell : cells) {
    set_owner(cell, static_cast<std::uint16_t>(segment));
  }
  n_live_ += cells.size();
}

Status LayerCache::seal(std::span<const Slot> slots, const SealAs& as,
                        std::span<const std::uint8_t> tiers, TaskTeam* team) {
  const format::BlockShape& shape = as.shape;
  ZC_CHECK(slots.size() == shape.n_tokens && !slots.empty());
  try {
    auto block = std::make_unique<SealedBlock>();
    block->layout = layout_for(shape);
    block->group = as.group;
    block->end_ordinal = as.end_ordinal;
    block->holds_values = as.holds_values;
    block->mass = as.mass;
    block->n_live = shape.n_tokens;
    const std::size_t bytes = block->layout->total_bytes();
    block->bytes.resize(bytes);
    const Gathered tokens = gather(slots, tiers, team);
    quant::QuantRules rules = policy_->quant_rules(shape_.layer);
    if (!as.key_factors.empty()) {
      rules.key.given_factors = as.key_factors;
    }
    rules.key.channel_weights = as.key_weights;
    quant::encode_block(*block->layout, rules, tokens.key_rows(), tokens.value_rows(), tokens.tiers,
                        block->bytes.data(), team);
    Expected<std::uint32_t> id = new_segment();
    if (!id) {
      return id.error();
    }
    if (!budget_->reserve(bytes)) {
      return over_budget(*budget_, bytes);
    }
    block->first_cell = tokens.cells.front();
    if (tokens.cells.back() - tokens.cells.front() + 1 != tokens.cells.size()) {
      block->cells = tokens.cells;
    }
    // Nothing fails from here on.
    move_cells(tokens.cells, *id);
    segments_[*id].block = std::move(block);
    return ok_status();
  } catch (const std::bad_alloc&) {
    return no_memory(new_page_bytes());
  }
}

Status LayerCache::append(std::uint32_t segment, std::span<const Slot> slots,
                          const format::BlockShape& added, std::uint32_t end_ordinal,
                          std::span<const std::uint8_t> tiers, TaskTeam* team) {
  ZC_CHECK(slots.size() == added.n_tokens && !slots.empty());
  try {
    SealedBlock& block = *segments_[segment].block;
    const Gathered tokens = gather(slots, tiers, team);
    ZC_CHECK(tokens.cells.front() > block.cell(block.n_tokens() - 1));
    const auto shape = format::joined_shape(block.layout->shape(), added);
    ZC_CHECK(shape.has_value());
    const auto layout = layout_for(*shape);
    const format::BlockLayout added_layout(added);
    AlignedVector<std::byte> bytes(layout->total_bytes());
    quant::append_tokens(*block.layout, block.bytes.data(), added_layout,
                         policy_->quant_rules(shape_.layer), tokens.key_rows(), tokens.value_rows(),
                         tokens.tiers, *layout, bytes.data(), team);
    std::vector<std::uint32_t> cells;
    if (!block.cells.empty() || tokens.cells.back() + 1 - block.first_cell != shape->n_tokens) {
      cells.reserve(shape->n_tokens);
      for (std::uint32_t token = 0; token < block.n_tokens(); ++token) {
        cells.push_back(block.cell(token));
      }
      cells.insert(cells.end(), tokens.cells.begin(), tokens.cells.end());
    }
    if (!budget_->reserve(bytes.size() - block.bytes.size())) {
      return over_budget(*budget_, bytes.size() - block.bytes.size());
    }
    // Nothing fails from here on.
    move_cells(tokens.cells, segment);
    block.layout = layout;
    block.bytes = std::move(bytes);
    block.cells = std::move(cells);
    block.n_live = shape->n_tokens;
    block.end_ordinal = end_ordinal;
    drop_unused_layouts();
    return ok_status();
  } catch (const std::bad_alloc&) {
    return no_memory(new_page_bytes());
  }
}

Status LayerCache::seal_values(std::uint32_t segment, const format::TensorFormat& value) {
  try {
    SealedBlock& block = *segments_[segment].block;
    ZC_CHECK(block.holds_values);
    format::BlockShape shape = block.layout->shape();
    shape.value = value;
    const auto layout = layout_for(shape);
    if (!budget_->reserve(layout->total_bytes())) {
      return over_budget(*budget_, layout->total_bytes());
    }
    AlignedVector<std::byte> bytes(layout->total_bytes());
    quant::replace_values(*block.layout, block.bytes.data(), *layout,
                          policy_->quant_rules(shape_.layer).value, decode(segment, Tensor::kValue),
                          bytes.data());
    budget_->release(block.bytes.size());
    block.bytes = std::move(bytes);
    block.layout = layout;
    block.holds_values = false;
    return ok_status();
  } catch (const std::bad_alloc&) {
    return no_memory(new_page_bytes());
  }
}

Expected<LayerCache::Slot> LayerCache::restore_exact(std::uint32_t cell) {
  const Slot slot = find(cell);
  if (const StagingPage* page = segments_[slot.segment].page.get()) {
    std::vector<float> keys(shape_.key_row), values(shape_.value_row);
    page->read(Tensor::kKey, slot.index, keys.data());
    page->read(Tensor::kValue, slot.index, values.data());
    const std::uint32_t group = page->tokens.empty() ? kNoGroup : page->tokens[slot.index].group;
    return restage(cell, 0, group, keys, values);
  }
  return restage(cell, slot.index, segments_[slot.segment].block->group,
                 decode(slot.segment, Tensor::kKey), decode(slot.segment, Tensor::kValue));
}

// Moves a cell into an exact page; its rows are number `token` of those given.
Expected<LayerCache::Slot> LayerCache::restage(std::uint32_t cell, std::uint32_t token,
                                               std::uint32_t group, const std::vector<float>& keys,
                                               const std::vector<float>& values) {
  release(cell);
  Expected<Slot> slot = stage(cell);
  if (slot) {
    write_row(Tensor::kKey, *slot, {keys.data(), shape_.key_row * sizeof(float), false}, token);
    write_row(Tensor::kValue, *slot, {values.data(), shape_.value_row * sizeof(float), false},
              token);
    segments_[slot->segment].page->tokens[slot->index].group = group;
  }
  return slot;
}

Expected<std::vector<LayerCache::Slot>> LayerCache::unseal(std::uint32_t segment,
                                                           std::vector<std::uint8_t>* tiers) {
  // Keeps the block alive while its tokens leave it one by one.
  const SealedBlock block = *segments_[segment].block;
  const std::vector<float> keys = decode(segment, Tensor::kKey);
  const std::vector<float> values = decode(segment, Tensor::kValue);
  std::vector<std::uint32_t> live;
  for (std::uint32_t token = 0; token < block.n_tokens(); ++token) {
    if (!block.is_dead(token)) {
      live.push_back(token);
    }
  }
  std::vector<std::uint8_t> head_tiers(block.n_tokens());
  for (std::uint32_t head = 0; head < n_kv_heads_; ++head) {
    format::read_tiers(*block.layout, block.bytes.data(), head, head_tiers.data());
    for (const std::uint32_t token : live) {
      tiers->push_back(head_tiers[token]);
    }
  }
  std::vector<Slot> slots;
  for (const std::uint32_t token : live) {
    Expected<Slot> slot = restage(block.cell(token), token, block.group, keys, values);
    if (!slot) {
      return slot.error();
    }
    slots.push_back(*slot);
  }
  return slots;
}

void LayerCache::evict(const Slot& slot) {
  const std::uint32_t cell = segments_[slot.segment].page->cells[slot.index];
  release(cell);
  set_owner(cell, kEvicted);
}

void LayerCache::compact_blocks() {
  if (!lost_sealed_tokens_) {
    return;  // what could not shrink then can't now
  }
  for (Segment& segment : segments_) {
    if (segment.block != nullptr && 2 * segment.block->n_live <= segment.block->n_tokens()) {
      try {
        compact_block(*segment.block);
      } catch (const std::bad_alloc&) {
        return;  // the blocks are as they were
      }
    }
  }
  lost_sealed_tokens_ = false;
}

void LayerCache::compact_block(SealedBlock& block) {
  std::vector<bool> live = block.dead;
  live.flip();
  const auto shape = format::subset_shape(*block.layout, block.bytes.data(), live);
  if (!shape) {
    return;
  }
  const auto layout = layout_for(*shape);
  if (layout->total_bytes() >= block.bytes.size()) {
    return;
  }
  AlignedVector<std::byte> bytes(layout->total_bytes());
  format::copy_subset(*block.layout, block.bytes.data(), live, *layout, bytes.data());
  std::vector<std::uint32_t> cells;
  for (std::uint32_t token = 0; token < block.n_tokens(); ++token) {
    if (live[token]) {
      cells.push_back(block.cell(token));
    }
  }
  cells.resize(shape->n_tokens, cells.back());
  std::vector<bool> dead(shape->n_tokens);
  std::fill(dead.begin() + block.n_live, dead.end(), true);
  if (block.n_live == shape->n_tokens) {
    dead.clear();
  }

  budget_->release(block.bytes.size() - bytes.size());
  block.layout = layout;
  block.bytes = std::move(bytes);
  block.cells = std::move(cells);
  block.dead = std::move(dead);
}

}  // namespace zipcache::cache
