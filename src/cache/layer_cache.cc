#include "cache/layer_cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "quant/block_codec.h"

namespace zipcache::cache {
namespace {

quant::QuantRules rules_of(const policy::Policy& policy) {
  return {policy.key.rules, policy.value.rules};
}

Error over_budget(const Budget& budget, std::size_t bytes) {
  return out_of_memory("KV cache is full: " + std::to_string(bytes) + " more bytes wanted, " +
                       std::to_string(budget.used()) + " of " + std::to_string(budget.limit()) +
                       " in use; raise the limit or shorten the context");
}

Error no_memory(std::size_t bytes) {
  return out_of_memory("KV cache could not get " + std::to_string(bytes) +
                       " bytes from the system; shorten the context");
}

float read_element(const RowsView& rows, std::size_t row, std::size_t column) {
  const std::byte* begin = static_cast<const std::byte*>(rows.data) + row * rows.stride_bytes;
  if (rows.is_half) {
    Half half;
    std::memcpy(&half, begin + column * sizeof(Half), sizeof half);
    return half_to_float(half);
  }
  float value;
  std::memcpy(&value, begin + column * sizeof(float), sizeof value);
  return value;
}

Half read_half(const RowsView& rows, std::size_t row, std::size_t column) {
  if (rows.is_half) {
    Half half;
    std::memcpy(
        &half,
        static_cast<const std::byte*>(rows.data) + row * rows.stride_bytes + column * sizeof(Half),
        sizeof half);
    return half;
  }
  return float_to_half(read_element(rows, row, column));
}

}  // namespace

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
  if (policy_->seals() && !format::BlockLayout::is_valid(policy::block_shape(
                              *policy_, kPageTokens, n_kv_heads, key_dim, value_dim))) {
    return unsupported("head_dim " + std::to_string(key_dim) +
                       " does not split as the policy asks: " + policy::describe(*policy_));
  }
  if (n_kv_heads_ == 0) {
    n_kv_heads_ = n_kv_heads;
    key_dim_ = key_dim;
    value_dim_ = value_dim;
    for (Segment& segment : segments_) {  // pages filled before the heads were known
      if (segment.page != nullptr && policy_->seals()) {
        segment.page->mass.assign(std::size_t{kPageTokens} * n_kv_heads_, 0.0f);
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
  owners_[cell / kMapCells][cell % kMapCells] = segment;
}

LayerCache::Slot LayerCache::find(std::uint32_t cell) const {
  const std::uint16_t segment = owner(cell);
  if (segment == kNoOwner) {
    return {};
  }
  if (const StagingPage* page = segments_[segment].page.get()) {
    const auto* slot = std::find(page->cells, page->cells + kPageTokens, cell);
    ZC_CHECK(slot != page->cells + kPageTokens);
    return {segment, static_cast<std::uint32_t>(slot - page->cells)};
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
  if (segments_.size() >= kNoOwner) {
    return unsupported("a layer of the KV cache holds at most 65535 pages and blocks");
  }
  segments_.emplace_back();
  return static_cast<std::uint32_t>(segments_.size() - 1);
}

std::size_t LayerCache::page_bytes() const {
  std::size_t bytes = sizeof(StagingPage) +
                      std::size_t{kPageTokens} * (shape_.key_row + shape_.value_row) * sizeof(Half);
  if (policy_->seals()) {
    bytes += kPageTokens * (sizeof(StagedToken) + n_kv_heads_ * sizeof(float));
  }
  return bytes;
}

void LayerCache::free_segment(std::uint32_t id) {
  Segment& segment = segments_[id];
  if (segment.page != nullptr) {
    budget_->release(page_bytes());
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
  std::erase_if(layouts_, [](const auto& layout) { return layout.use_count() == 1; });
  layouts_.push_back(std::make_shared<const format::BlockLayout>(shape));
  return layouts_.back();
}

Expected<LayerCache::Slot> LayerCache::stage(std::uint32_t cell) {
  const auto has_room = [this](std::uint32_t id) {
    return id < segments_.size() && segments_[id].page != nullptr &&
           segments_[id].page->used < kPageTokens;
  };
  make_owner_map(cell);
  if (!has_room(open_page_)) {
    open_page_ = UINT32_MAX;
    for (std::uint32_t id = 0; id < segments_.size() && open_page_ == UINT32_MAX; ++id) {
      open_page_ = has_room(id) ? id : UINT32_MAX;
    }
  }
  if (open_page_ == UINT32_MAX) {
    if (!budget_->reserve(page_bytes())) {
      return over_budget(*budget_, page_bytes());
    }
    auto page = std::make_unique<StagingPage>();
    page->keys.resize(std::size_t{shape_.key_row} * kPageTokens);
    page->values.resize(std::size_t{shape_.value_row} * kPageTokens);
    std::fill_n(page->cells, kPageTokens, kNoCell);
    if (policy_->seals()) {
      page->tokens.resize(kPageTokens);
      page->mass.resize(std::size_t{kPageTokens} * n_kv_heads_);
    }
    Expected<std::uint32_t> id = new_segment();
    if (!id) {
      budget_->release(page_bytes());
      return id.error();
    }
    segments_[*id].page = std::move(page);
    open_page_ = *id;
  }
  StagingPage& page = *segments_[open_page_].page;
  const auto slot = static_cast<std::uint32_t>(
      std::find(page.cells, page.cells + kPageTokens, kNoCell) - page.cells);
  page.cells[slot] = cell;
  ++page.used;
  ++n_live_;
  for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
    page.keys[std::size_t{column} * kPageTokens + slot] = 0;
  }
  std::fill_n(page.values.begin() + std::size_t{slot} * shape_.value_row, shape_.value_row,
              Half{0});
  set_owner(cell, static_cast<std::uint16_t>(open_page_));
  reset_statistics(page, slot);
  return Slot{open_page_, slot};
}

void LayerCache::reset_statistics(StagingPage& page, std::uint32_t slot) {
  if (page.tokens.empty()) {
    return;
  }
  page.tokens[slot] = {.arrival = next_arrival_++};
  std::fill_n(page.mass.begin() + std::size_t{slot} * n_kv_heads_, n_kv_heads_, 0.0f);
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
}

// ---- rows in and out -------------------------------------------------------------------------

Status LayerCache::put(Tensor tensor, std::span<const std::uint32_t> cells, const RowsView& rows) {
  try {
    if (tensor == Tensor::kKey) {
      newest_cells_.assign(cells.begin(), cells.end());
    }
    for (std::size_t row = 0; row < cells.size(); ++row) {
      const std::uint32_t cell = cells[row];
      ZC_CHECK(cell < shape_.n_cells);
      Slot slot = find(cell);
      if (slot.found() && segments_[slot.segment].block != nullptr) {
        // A new key makes a new token; a value alone completes the token that is there.
        if (tensor == Tensor::kKey) {
          release(cell);
          slot = {};
        } else {
          Expected<Slot> staged = unseal_token(cell);
          if (!staged) {
            return staged.error();
          }
          slot = *staged;
        }
      }
      if (!slot.found()) {
        Expected<Slot> staged = stage(cell);
        if (!staged) {
          return staged.error();
        }
        slot = *staged;
      } else if (tensor == Tensor::kKey) {
        reset_statistics(*segments_[slot.segment].page, slot.index);
      }
      write_row(tensor, slot, rows, row);
    }
    return ok_status();
  } catch (const std::bad_alloc&) {
    return no_memory(page_bytes());
  }
}

void LayerCache::write_row(Tensor tensor, const Slot& slot, const RowsView& rows, std::size_t row) {
  StagingPage& page = *segments_[slot.segment].page;
  if (tensor == Tensor::kKey) {
    Half* out = page.keys.data() + slot.index;
    for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
      out[std::size_t{column} * kPageTokens] = read_half(rows, row, column);
    }
  } else {
    Half* out = page.values.data() + std::size_t{slot.index} * shape_.value_row;
    for (std::uint32_t column = 0; column < shape_.value_row; ++column) {
      out[column] = read_half(rows, row, column);
    }
  }
}

void LayerCache::read_staged(const Slot& slot, Tensor tensor, float* row) const {
  const StagingPage& page = *segments_[slot.segment].page;
  if (tensor == Tensor::kKey) {
    for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
      row[column] = half_to_float(page.keys[std::size_t{column} * kPageTokens + slot.index]);
    }
  } else {
    const Half* values = page.values.data() + std::size_t{slot.index} * shape_.value_row;
    for (std::uint32_t column = 0; column < shape_.value_row; ++column) {
      row[column] = half_to_float(values[column]);
    }
  }
}

void LayerCache::get(Tensor tensor, std::uint32_t first_cell, std::uint32_t n, Half* out) const {
  const std::uint32_t width = tensor == Tensor::kKey ? shape_.key_row : shape_.value_row;
  std::vector<float> decoded;  // the latest block met: runs of cells lie in one block
  std::uint32_t decoded_segment = UINT32_MAX;
  std::vector<float> row(width);
  for (std::uint32_t i = 0; i < n; ++i, out += width) {
    const Slot slot = find(first_cell + i);
    if (!slot.found()) {
      std::fill_n(out, width, Half{0});
      continue;
    }
    const float* values = row.data();
    if (segments_[slot.segment].page != nullptr) {
      read_staged(slot, tensor, row.data());
    } else {
      if (decoded_segment != slot.segment) {
        decoded = decode(slot.segment, tensor);
        decoded_segment = slot.segment;
      }
      values = decoded.data() + std::size_t{slot.index} * width;
    }
    std::transform(values, values + width, out, float_to_half);
  }
}

std::vector<float> LayerCache::decode(std::uint32_t segment, Tensor tensor) const {
  const SealedBlock& block = *segments_[segment].block;
  const bool keys = tensor == Tensor::kKey;
  std::vector<float> rows(std::size_t{block.n_tokens()} *
                          (keys ? shape_.key_row : shape_.value_row));
  quant::decode_block(*block.layout, block.bytes.data(),
                      keys ? std::span(rows) : std::span<float>{},
                      keys ? std::span<float>{} : std::span(rows));
  return rows;
}

void LayerCache::rotate_keys(const Rotate& rotate) {
  std::vector<std::uint32_t> cells;
  std::vector<float> keys;
  for (std::uint32_t id = 0; id < segments_.size(); ++id) {
    if (StagingPage* page = segments_[id].page.get()) {
      cells.clear();
      keys.resize(std::size_t{page->used} * shape_.key_row);
      for (std::uint32_t slot = 0; slot < kPageTokens; ++slot) {
        if (page->cells[slot] != kNoCell) {
          read_staged({id, slot}, Tensor::kKey, keys.data() + cells.size() * shape_.key_row);
          cells.push_back(page->cells[slot]);
        }
      }
      if (!rotate(cells, keys.data())) {
        continue;
      }
      const RowsView rows{keys.data(), shape_.key_row * sizeof(float), false};
      std::size_t row = 0;
      for (std::uint32_t slot = 0; slot < kPageTokens; ++slot) {
        if (page->cells[slot] != kNoCell) {
          write_row(Tensor::kKey, {id, slot}, rows, row++);
        }
      }
    } else if (SealedBlock* block = segments_[id].block.get()) {
      cells.resize(block->n_tokens());
      for (std::uint32_t token = 0; token < block->n_tokens(); ++token) {
        cells[token] = block->cell(token);
      }
      keys = decode(id, Tensor::kKey);
      if (rotate(cells, keys.data())) {
        quant::replace_keys(*block->layout, rules_of(*policy_), keys, block->bytes.data());
      }
    }
  }
}

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
      const std::size_t bytes = from.page != nullptr    ? page_bytes()
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
  return ok_status();
}

// ---- sealing ---------------------------------------------------------------------------------

Status LayerCache::seal(std::span<const Slot> slots, const format::BlockShape& shape,
                        std::span<const std::uint8_t> tiers, std::uint32_t group) {
  ZC_CHECK(slots.size() == shape.n_tokens && !slots.empty());
  try {
    auto block = std::make_unique<SealedBlock>();
    block->layout = layout_for(shape);
    block->group = group;
    block->n_live = shape.n_tokens;
    const std::size_t bytes = block->layout->total_bytes();
    block->bytes.resize(bytes);
    const auto cell_of = [this](const Slot& slot) {
      return segments_[slot.segment].page->cells[slot.index];
    };
    const std::size_t n = slots.size();
    std::vector<std::uint32_t> order(n);  // token of the block (ascending cells) -> slots[]
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      return cell_of(slots[a]) < cell_of(slots[b]);
    });
    std::vector<float> keys(n * shape_.key_row);
    std::vector<float> values(n * shape_.value_row);
    std::vector<std::uint32_t> cells(n);
    std::vector<std::uint8_t> sorted_tiers(tiers.size());
    for (std::size_t token = 0; token < n; ++token) {
      const Slot& slot = slots[order[token]];
      read_staged(slot, Tensor::kKey, keys.data() + token * shape_.key_row);
      read_staged(slot, Tensor::kValue, values.data() + token * shape_.value_row);
      cells[token] = cell_of(slot);
      for (std::size_t head = 0; head * n < tiers.size(); ++head) {
        sorted_tiers[head * n + token] = tiers[head * n + order[token]];
      }
    }
    quant::encode_block(*block->layout, rules_of(*policy_), keys, values, sorted_tiers,
                        block->bytes.data());
    Expected<std::uint32_t> id = new_segment();
    if (!id) {
      return id.error();
    }
    if (!budget_->reserve(bytes)) {
      return over_budget(*budget_, bytes);
    }
    block->first_cell = cells.front();
    if (cells.back() - cells.front() + 1 != cells.size()) {
      block->cells = cells;
    }
    // Nothing fails from here on.
    for (const Slot& slot : slots) {
      release(cell_of(slot));
    }
    for (const std::uint32_t cell : cells) {
      set_owner(cell, static_cast<std::uint16_t>(*id));
    }
    n_live_ += cells.size();
    segments_[*id].block = std::move(block);
    return ok_status();
  } catch (const std::bad_alloc&) {
    return no_memory(page_bytes());
  }
}

Expected<LayerCache::Slot> LayerCache::unseal_token(std::uint32_t cell) {
  const Slot sealed = find(cell);
  const std::vector<float> keys = decode(sealed.segment, Tensor::kKey);
  const std::vector<float> values = decode(sealed.segment, Tensor::kValue);
  const std::uint32_t group = segments_[sealed.segment].block->group;
  release(cell);
  Expected<Slot> slot = stage(cell);
  if (slot) {
    write_row(Tensor::kKey, *slot, {keys.data(), shape_.key_row * sizeof(float), false},
              sealed.index);
    write_row(Tensor::kValue, *slot, {values.data(), shape_.value_row * sizeof(float), false},
              sealed.index);
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
    release(block.cell(token));
    Expected<Slot> slot = stage(block.cell(token));
    if (!slot) {
      return slot.error();
    }
    write_row(Tensor::kKey, *slot, {keys.data(), shape_.key_row * sizeof(float), false}, token);
    write_row(Tensor::kValue, *slot, {values.data(), shape_.value_row * sizeof(float), false},
              token);
    segments_[slot->segment].page->tokens[slot->index].group = block.group;
    slots.push_back(*slot);
  }
  return slots;
}

void LayerCache::compact_staging() {
  std::vector<std::uint32_t> pages;
  for (std::uint32_t id = 0; id < segments_.size(); ++id) {
    if (segments_[id].page != nullptr) {
      pages.push_back(id);
    }
  }
  std::size_t front = 0;
  std::size_t back = pages.size();
  while (front + 1 < back) {
    StagingPage& to = *segments_[pages[front]].page;
    StagingPage& from = *segments_[pages[back - 1]].page;
    if (to.used == kPageTokens) {
      ++front;
    } else if (from.used == 0) {
      free_segment(pages[--back]);
    } else {
      move_token(pages[back - 1], pages[front]);
    }
  }
  if (back > 0 && segments_[pages[back - 1]].page->used == 0) {
    free_segment(pages[back - 1]);
  }
}

void LayerCache::move_token(std::uint32_t from_page, std::uint32_t to_page) {
  StagingPage& from = *segments_[from_page].page;
  StagingPage& to = *segments_[to_page].page;
  const auto source =
      static_cast<std::uint32_t>(std::find_if(from.cells, from.cells + kPageTokens,
                                              [](std::uint32_t cell) { return cell != kNoCell; }) -
                                 from.cells);
  const auto target =
      static_cast<std::uint32_t>(std::find(to.cells, to.cells + kPageTokens, kNoCell) - to.cells);
  for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
    to.keys[std::size_t{column} * kPageTokens + target] =
        from.keys[std::size_t{column} * kPageTokens + source];
  }
  std::copy_n(from.values.begin() + std::size_t{source} * shape_.value_row, shape_.value_row,
              to.values.begin() + std::size_t{target} * shape_.value_row);
  if (!to.tokens.empty()) {
    to.tokens[target] = from.tokens[source];
    std::copy_n(from.mass.begin() + std::size_t{source} * n_kv_heads_, n_kv_heads_,
                to.mass.begin() + std::size_t{target} * n_kv_heads_);
  }
  to.cells[target] = from.cells[source];
  from.cells[source] = kNoCell;
  set_owner(to.cells[target], static_cast<std::uint16_t>(to_page));
  ++to.used;
  --from.used;
}

// ---- accounting ------------------------------------------------------------------------------

ByteCount LayerCache::bytes() const {
  ByteCount count;
  const std::size_t token_bytes = (shape_.key_row + shape_.value_row) * sizeof(Half);
  for (const Segment& segment : segments_) {
    if (segment.page != nullptr) {
      const std::size_t free_bytes = (kPageTokens - segment.page->used) * token_bytes;
      count.slack += free_bytes;
      count.staging += page_bytes() - free_bytes;
      count.live_tokens += segment.page->used;
    } else if (segment.block != nullptr) {
      const SealedBlock& block = *segment.block;
      const std::size_t dead_bytes =
          block.layout->codes_bytes() / block.n_tokens() * (block.n_tokens() - block.n_live);
      count.codes += block.layout->codes_bytes() - dead_bytes;
      count.slack += dead_bytes;
      count.params += block.layout->params_bytes();
      count.masks += block.layout->masks_bytes() + sizeof(SealedBlock) +
                     block.cells.capacity() * sizeof(std::uint32_t) + block.dead.capacity() / 8;
      count.live_tokens += block.n_live;
      count.sealed_tokens += block.n_live;
    }
  }
  count.masks += segments_.capacity() * sizeof(Segment);
  for (const auto& piece : owners_) {
    count.masks += sizeof(piece) + (piece != nullptr ? kMapCells * sizeof(std::uint16_t) : 0);
  }
  count.masks += layouts_.size() * sizeof(format::BlockLayout);
  count.fp16 = count.live_tokens * token_bytes;
  return count;
}

}  // namespace zipcache::cache
