// Rows in and out of a LayerCache: put, get, rotate.
#include <algorithm>
#include <cstring>
#include <new>

#include "base/check.h"
#include "cache/errors.h"
#include "cache/layer_cache.h"
#include "quant/block_codec.h"

namespace zipcache::cache {
namespace {

Half read_half(const RowsView& rows, std::size_t row, std::size_t column) {
  const std::byte* begin = static_cast<const std::byte*>(rows.data) + row * rows.stride_bytes;
  if (rows.is_half) {
    Half half;
    std::memcpy(&half, begin + column * sizeof half, sizeof half);
    return half;
  }
  float value;
  std::memcpy(&value, begin + column * sizeof value, sizeof value);
  return float_to_half(value);
}

}  // namespace

Status LayerCache::put(Tensor tensor, std::span<const std::uint32_t> cells, const RowsView& rows) {
  try {
    if (tensor == Tensor::kKey) {
      newest_cells_.assign(cells.begin(), cells.end());
    }
    for (std::size_t row = 0; row < cells.size(); ++row) {
      const std::uint32_t cell = cells[row];
      ZC_CHECK(cell < shape_.n_cells);
      Slot slot = find(cell);
      if (slot.found() && !is_exact(slot)) {
        // A new key makes a new token; a value alone completes the token that is there.
        if (tensor == Tensor::kKey) {
          release(cell);
          slot = {};
        } else {
          Expected<Slot> staged = restore_exact(cell);
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
        segments_[slot.segment].page->reset_statistics(slot.index, next_arrival_++);
      }
      write_row(tensor, slot, rows, row);
    }
    return ok_status();
  } catch (const std::bad_alloc&) {
    return no_memory(new_page_bytes());
  }
}

void LayerCache::write_row(Tensor tensor, const Slot& slot, const RowsView& rows, std::size_t row) {
  StagingPage& page = *segments_[slot.segment].page;
  if (tensor == Tensor::kKey) {
    Half* out = page.exact_keys() + slot.index;
    for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
      out[std::size_t{column} * page.capacity()] = read_half(rows, row, column);
    }
  } else {
    Half* out = page.exact_values() + std::size_t{slot.index} * shape_.value_row;
    bool finite = true;
    for (std::uint32_t column = 0; column < shape_.value_row; ++column) {
      out[column] = read_half(rows, row, column);
      finite &= (out[column] & 0x7c00u) != 0x7c00u;
    }
    page.has_non_finite |= !finite;
  }
}

// A page's keys are converted whole, channel by channel as they lie: one at a time took half of the
// time of sealing.
void LayerCache::read_staged(std::span<const Slot> slots, std::span<const std::uint32_t> order,
                             float* keys, float* values, TaskTeam* team) const {
  std::vector<std::uint32_t> pages;
  for (const Slot& slot : slots) {
    if (std::find(pages.begin(), pages.end(), slot.segment) == pages.end()) {
      pages.push_back(slot.segment);
    }
  }
  for_each(team, pages.size(), [&](std::size_t i) {
    const StagingPage& page = *segments_[pages[i]].page;
    std::vector<float> page_keys(std::size_t{shape_.key_row} * page.capacity());
    page.read_all_keys(page_keys.data());
    for (std::size_t row = 0; row < order.size(); ++row) {
      const Slot& slot = slots[order[row]];
      if (slot.segment != pages[i]) {
        continue;
      }
      float* out = keys + row * shape_.key_row;
      for (std::uint32_t column = 0; column < shape_.key_row; ++column) {
        out[column] = page_keys[std::size_t{column} * page.capacity() + slot.index];
      }
      page.read(Tensor::kValue, slot.index, values + row * shape_.value_row);
    }
  });
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
      for (std::uint32_t slot = 0; slot < page->capacity(); ++slot) {
        if (page->cells[slot] != kNoCell) {
          page->read(Tensor::kKey, slot, keys.data() + cells.size() * shape_.key_row);
          cells.push_back(page->cells[slot]);
        }
      }
      if (!rotate(cells, keys.data())) {
        continue;
      }
      const float* row = keys.data();
      for (std::uint32_t slot = 0; slot < page->capacity(); ++slot) {
        if (page->cells[slot] != kNoCell) {
          page->write(Tensor::kKey, slot, row);
          row += shape_.key_row;
        }
      }
    } else if (SealedBlock* block = segments_[id].block.get()) {
      cells.resize(block->n_tokens());
      for (std::uint32_t token = 0; token < block->n_tokens(); ++token) {
        cells[token] = block->cell(token);
      }
      keys = decode(id, Tensor::kKey);
      if (rotate(cells, keys.data())) {
        quant::replace_keys(*block->layout, policy_->quant_rules(shape_.layer), keys,
                            block->bytes.data());
      }
    }
  }
}

}  // namespace zipcache::cache
