// What a LayerCache holds and where: the cell map, pages and blocks, accounting.
#include "cache/layer_cache.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/check.h"
#include "cache/errors.h"

namespace zipcache::cache {

LayerCache::LayerCache(const Shape& shape, std::shared_ptr<const policy::Policy> policy,
                       std::shared_ptr<Budget> budget)
    : shape_(shape), policy_(std::move(policy)), budget_(std::move(budget)) {
  ZC_CHECK(policy_ != nullptr && budget_ != nullptr);
  ZC_CHECK(shape.key_row > 0 && shape.value_row > 0);
}

LayerCache::~LayerCache() { clear(); }

Status LayerCache::set_heads(std::uint32_t n_kv_heads, std::uint32_t key_dim,
                             std::uint32_t value_dim) {
  const auto dim_ok = [](std::uint32_t dim) { return dim % 16 == 0 && dim >= 16 && dim <= 512; };
  if (!dim_ok(key_dim) || !dim_ok(value_dim)) {
    return unsupported("head_dim " + std::to_string(key_dim) + " (K) and " +
                       std::to_string(value_dim) +
                       " (V) found; supported are multiples of 16 from 16 to 512");
  }
  if (n_kv_heads * key_dim != shape_.key_row || n_kv_heads * value_dim != shape_.value_row) {
    return unsupported(std::to_string(n_kv_heads) + " KV heads of " + std::to_string(key_dim) +
                       " and " + std::to_string(value_dim) + " channels do not make rows of " +
                       std::to_string(shape_.key_row) + " and " + std::to_string(shape_.value_row));
  }
  if (n_kv_heads_ != 0 && (n_kv_heads_ != n_kv_heads || key_dim_ != key_dim)) {
    return unsupported("the number of KV heads of a layer changed from " +
                       std::to_string(n_kv_heads_) + " to " + std::to_string(n_kv_heads));
  }
  if (Status served = policy::serves_layer(*policy_, shape_.layer, n_kv_heads, key_dim, value_dim);
      !served) {
    return served;
  }
  if (policy_->seals() && !format::BlockLayout::is_valid(policy::block_shape(
                              *policy_, kPageTokens, n_kv_heads, key_dim, value_dim))) {
    return unsupported("head_dim " + std::to_string(key_dim) +
                       " does not split as the policy asks: " + policy::describe(*policy_));
  }
  if (policy_->kv_centibits > 0) {
    const std::uint32_t least = policy::least_centibits(
        *policy_, policy_->block_tokens == 0 ? kPageTokens : policy_->block_tokens, n_kv_heads,
        key_dim, value_dim);
    if (policy_->kv_centibits < least) {
      return unsupported("kv-bits is below the " + std::to_string(least / 100) + "." +
                         std::to_string(least / 10 % 10) + std::to_string(least % 10) +
                         " bits per element that a whole block of " + std::to_string(n_kv_heads) +
                         " KV heads of " + std::to_string(key_dim) + " channels takes at least");
    }
  }
  if (n_kv_heads_ == 0) {
    n_kv_heads_ = n_kv_heads;
    key_dim_ = key_dim;
    value_dim_ = value_dim;
    for (Segment& segment : segments_) {  // pages filled before the heads were known
      if (StagingPage* page = segment.page.get()) {
        const StagingPage::Shape shape = page_shape(page->capacity(), /*packed=*/false);
        const std::size_t bytes = shape.bytes() - page->bytes();
        if (!budget_->reserve(bytes)) {
          return over_budget(*budget_, bytes);
        }
        page->shape = shape;
        page->mass.assign(page->tokens.size() * n_kv_heads_, 0.0f);
        page->squares.assign(shape.has_squares ? page->mass.size() : 0, 0.0f);
      }
    }
  }
  return ok_status();
}

// ---- cell -> segment map ---------------------------------------------------------------------

void LayerCache::make_owner_map(std::uint32_t cell) {
  const std::size_t piece = cell / kMapCells;
  if (owners_.size() <= piece) {
    owners_.resize(piece + 1);
  }
  if (owners_[piece] == nullptr) {
    owners_[piece] = std::make_unique<std::uint16_t[]>(kMapCells);
    std::fill_n(owners_[piece].get(), kMapCells, kNoOwner);
  }
}

std::uint16_t LayerCache::owner(std::uint32_t cell) const {
  const std::size_t piece = cell / kMapCells;
  return piece < owners_.size() && owners_[piece] != nullptr ? owners_[piece][cell % kMapCells]
                                                             : kNoOwner;
}

void LayerCache::set_owner(std::uint32_t cell, std::uint16_t segment) {
  std::uint16_t& owner = owners_[cell / kMapCells][cell % kMapCells];
  n_evicted_ += (segment == kEvicted ? 1 : 0);
  n_evicted_ -= (owner == kEvicted ? 1 : 0);
  owner = segment;
}

LayerCache::Slot LayerCache::find(std::uint32_t cell) const {
  const std::uint16_t segment = owner(cell);
  if (segment == kNoOwner || segment == kEvicted) {
    return {};
  }
  if (const StagingPage* page = segments_[segment].page.get()) {
    const auto slot = std::find(page->cells.begin(), page->cells.end(), cell);
    ZC_CHECK(slot != page->cells.end());
    return {segment, static_cast<std::uint32_t>(slot - page->cells.begin())};
  }
  const SealedBlock& block = *segments_[segment].block;
  if (block.cells.empty()) {
    return {segment, cell - block.first_cell};
  }
  const auto token = std::lower_bound(block.cells.begin(), block.cells.end(), cell);
  ZC_CHECK(token != block.cells.end() && *token == cell);
  return {segment, static_cast<std::uint32_t>(token - block.cells.begin())};
}

// ---- segments --------------------------------------------------------------------------------

Expected<std::uint32_t> LayerCache::new_segment() {
  for (std::uint32_t id = 0; id < segments_.size(); ++id) {
    if (segments_[id].page == nullptr && segments_[id].block == nullptr) {
      return id;
    }
  }
  if (segments_.size() >= kEvicted) {
    return unsupported("a layer of the KV cache holds at most 65534 pages and blocks");
  }
  segments_.emplace_back();
  return static_cast<std::uint32_t>(segments_.size() - 1);
}

void LayerCache::free_segment(std::uint32_t id) {
  Segment& segment = segments_[id];
  if (segment.page != nullptr) {
    budget_->release(segment.page->bytes());
    segment.page.reset();
    if (open_page_ == id) {
      open_page_ = UINT32_MAX;
    }
  }
  if (segment.block != nullptr) {
    budget_->release(segment.block->bytes.size());
    segment.block.reset();
  }
}

std::shared_ptr<const format::BlockLayout> LayerCache::layout_for(const format::BlockShape& shape) {
  // Few shapes occur (the chunk sizes of prefill and decode); sharing keeps a block's own
  // description out of the bytes per token.
  for (const auto& layout : layouts_) {
    if (layout->shape() == shape) {
      return layout;
    }
  }
  drop_unused_layouts();
  layouts_.push_back(std::make_shared<const format::BlockLayout>(shape));
  return layouts_.back();
}

void LayerCache::drop_unused_layouts() {
  std::erase_if(layouts_, [](const auto& layout) { return layout.use_count() == 1; });
}

Expected<LayerCache::Slot> LayerCache::stage(std::uint32_t cell) {
  const auto has_room = [this](std::uint32_t id) {
    return id < segments_.size() && segments_[id].page != nullptr &&
           !segments_[id].page->shape.packed && !segments_[id].page->is_full();
  };
  make_owner_map(cell);
  if (!has_room(open_page_)) {
    open_page_ = UINT32_MAX;
    for (std::uint32_t id = 0; id < segments_.size() && open_page_ == UINT32_MAX; ++id) {
      open_page_ = has_room(id) ? id : UINT32_MAX;
    }
  }
  if (open_page_ == UINT32_MAX) {
    const auto n_new = static_cast<std::uint32_t>(newest_cells_.size());
    const std::uint32_t capacity = packs() ? std::clamp(n_new, 1u, kPageTokens) : kPageTokens;
    Expected<std::uint32_t> id = make_page(capacity, /*packed=*/false);
    if (!id) {
      return id.error();
    }
    open_page_ = *id;
  }
  StagingPage& page = *segments_[open_page_].page;
  const std::uint32_t slot = page.free_slot();
  page.cells[slot] = cell;
  ++page.used;
  ++n_live_;
  for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
    page.exact_keys()[std::size_t{column} * page.capacity() + slot] = 0;
  }
  std::fill_n(page.exact_values() + std::size_t{slot} * shape_.value_row, shape_.value_row,
              Half{0});
  set_owner(cell, static_cast<std::uint16_t>(open_page_));
  page.reset_statistics(slot, next_arrival_++);
  return Slot{open_page_, slot};
}

void LayerCache::release(std::uint32_t cell) {
  const Slot slot = find(cell);
  if (!slot.found()) {
    return;
  }
  set_owner(cell, kNoOwner);
  --n_live_;
  if (StagingPage* page = segments_[slot.segment].page.get()) {
    page->cells[slot.index] = kNoCell;
    if (--page->used == 0) {
      free_segment(slot.segment);
    }
    return;
  }
  SealedBlock& block = *segments_[slot.segment].block;
  if (block.dead.empty()) {
    block.dead.resize(block.n_tokens());
  }
  block.dead[slot.index] = true;
  lost_sealed_tokens_ = true;
  if (--block.n_live == 0) {
    free_segment(slot.segment);
  }
}

void LayerCache::clear() {
  for (std::uint32_t id = 0; id < segments_.size(); ++id) {
    free_segment(id);
  }
  segments_.clear();
  owners_.clear();
  layouts_.clear();
  newest_cells_.clear();
  groups_.clear();
  open_page_ = UINT32_MAX;
  next_arrival_ = 0;
  next_group_ = 0;
  n_live_ = 0;
  lost_sealed_tokens_ = false;
  n_evicted_ = 0;
}

// ---- whole caches ----------------------------------------------------------------------------

Status LayerCache::copy_from(const LayerCache& other) {
  ZC_CHECK(other.policy_ == policy_ && other.shape_.key_row == shape_.key_row &&
           other.shape_.value_row == shape_.value_row && other.shape_.n_cells == shape_.n_cells);
  if (this == &other) {
    return ok_status();
  }
  clear();
  n_kv_heads_ = other.n_kv_heads_;
  key_dim_ = other.key_dim_;
  value_dim_ = other.value_dim_;
  try {
    segments_.resize(other.segments_.size());
    for (std::size_t id = 0; id < segments_.size(); ++id) {
      const Segment& from = other.segments_[id];
      const std::size_t bytes = from.page != nullptr    ? from.page->bytes()
                                : from.block != nullptr ? from.block->bytes.size()
                                                        : 0;
      if (!budget_->reserve(bytes)) {
        clear();
        return over_budget(*budget_, bytes);
      }
      if (from.page != nullptr) {
        segments_[id].page = std::make_unique<StagingPage>(*from.page);
      } else if (from.block != nullptr) {
        segments_[id].block = std::make_unique<SealedBlock>(*from.block);
      }
    }
    owners_.resize(other.owners_.size());
    for (std::size_t piece = 0; piece < owners_.size(); ++piece) {
      if (other.owners_[piece] != nullptr) {
        owners_[piece] = std::make_unique<std::uint16_t[]>(kMapCells);
        std::copy_n(other.owners_[piece].get(), kMapCells, owners_[piece].get());
      }
    }
    layouts_ = other.layouts_;
    groups_ = other.groups_;
  } catch (const std::bad_alloc&) {
    clear();
    return no_memory(other.bytes().total());
  }
  open_page_ = other.open_page_;
  next_arrival_ = other.next_arrival_;
  next_group_ = other.next_group_;
  n_live_ = other.n_live_;
  lost_sealed_tokens_ = other.lost_sealed_tokens_;
  n_evicted_ = other.n_evicted_;
  return ok_status();
}

ByteCount LayerCache::bytes() const {
  ByteCount count;
  const std::size_t token_bytes = (shape_.key_row + shape_.value_row) * sizeof(Half);
  for (const Segment& segment : segments_) {
    if (segment.page != nullptr) {
      const StagingPage& page = *segment.page;
      const std::size_t free_bytes = (page.capacity() - page.used) * page.shape.row_bytes();
      count.slack += free_bytes;
      count.staging += page.bytes() - free_bytes;
      count.live_tokens += page.used;
    } else if (segment.block != nullptr) {
      const SealedBlock& block = *segment.block;
      const std::size_t dead_bytes =
          block.layout->codes_bytes() / block.n_tokens() * (block.n_tokens() - block.n_live);
      count.codes += block.layout->codes_bytes() - dead_bytes;
      count.slack += dead_bytes;
      count.params += block.layout->params_bytes();
      count.masks += block.layout->masks_bytes() + sizeof(SealedBlock) +
                     block.cells.capacity() * sizeof(std::uint32_t) + block.dead.capacity() / 8 +
                     block.mass.size() * sizeof(float);
      count.live_tokens += block.n_live;
      count.sealed_tokens += block.n_live;
    }
  }
  count.masks += segments_.capacity() * sizeof(Segment);
  for (const TokenGroup& group : groups_) {
    count.masks += sizeof group +
                   (group.query_max.size() + group.key_factors.size()) * sizeof(float) +
                   group.query_power.size();
  }
  for (const auto& piece : owners_) {
    count.masks += sizeof(piece) + (piece != nullptr ? kMapCells * sizeof(std::uint16_t) : 0);
  }
  count.masks += layouts_.size() * sizeof(format::BlockLayout);
  count.live_tokens += n_evicted_;
  count.sealed_tokens += n_evicted_;
  count.fp16 = count.live_tokens * token_bytes;
  return count;
}

}  // namespace zipcache::cache
