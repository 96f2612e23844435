// Streams outside of steps: copied, restored, given pages of their own, and where their tokens are.
#include <algorithm>

#include "cache/cuda/page_table.h"

namespace zipcache::cuda {

void PageTable::copy_stream(std::uint32_t from, std::uint32_t to) {
  if (from == to) {
    return;
  }
  clear_stream(to);
  streams_in_use_ = std::max(streams_in_use_, to + 1);
  const Stream& source = streams_[from];
  Stream& target = streams_[to];
  target.tail = source.tail;
  target.restored = source.restored;
  target.slot_of_cell = source.slot_of_cell;
  target.n_seen = source.n_seen;
  target.has_factors = source.has_factors;
  target.has_query_power = source.has_query_power;
  for (const auto& block : source.blocks) {
    auto copy = std::make_shared<PagedBlock>(*block);
    copy->serial = next_serial_++;
    ++*copy->n_owners;
    copy->first_cell = cells_.allocate(copy->n_tokens);
    block_cells_.resize(std::max<std::size_t>(cells_.end(), block_cells_.size()), -1);
    std::copy(copy->cells.begin(), copy->cells.end(), block_cells_.begin() + copy->first_cell);
    target.blocks.push_back(std::move(copy));
  }
  ++cells_version_;
  const auto held = [&](std::uint32_t stream) {
    return held_.begin() + static_cast<std::ptrdiff_t>(std::size_t{stream} * shape_.n_cells);
  };
  std::copy_n(held(from), shape_.n_cells, held(to));
}

std::optional<PagedBlock> PageTable::own_pages(std::uint32_t stream, std::size_t index) {
  std::shared_ptr<PagedBlock>& block = streams_[stream].blocks[index];
  if (*block->n_owners == 1) {
    return std::nullopt;
  }
  ++version_;
  const std::shared_ptr<PagedBlock> shared = block;
  block = new_block(shared->cells);
  block->n_live = shared->n_live;
  free_block(*shared);
  return *shared;
}

std::vector<std::int32_t> PageTable::restore(std::uint32_t index,
                                             std::span<const std::int32_t> cells) {
  ++version_;
  streams_in_use_ = std::max(streams_in_use_, index + 1);
  Stream& stream = streams_[index];
  stream.slot_of_cell.resize(shape_.n_cells, -1);
  stream.decode_flags.clear();
  const std::uint32_t most_sinks = kTailTokens - policy_.hold_tokens - policy_.seal_tokens;
  std::vector<std::int32_t> slots;
  slots.reserve(cells.size());
  for (const std::int32_t cell : cells) {
    std::int32_t& slot = stream.slot_of_cell[cell];
    if (slot < 0) {
      const std::size_t held = std::size_t{index} * shape_.n_cells + cell;
      if (held_[held]) {
        give_up(stream, cell);
      }
      held_[held] = true;
      // The first rows are those of a sequence's first tokens: positions are not told.
      const auto n_sinks = static_cast<std::uint32_t>(std::count_if(
          stream.tail.begin(), stream.tail.end(), [](const TailToken& t) { return t.is_sink; }));
      slot = static_cast<std::int32_t>(stream.restored.size());
      const auto nth = static_cast<std::uint32_t>(slot);
      stream.restored.push_back({cell, nth < policy_.sink_tokens && n_sinks + nth < most_sinks});
    }
    slots.push_back(slot);
  }
  return slots;
}

std::vector<std::int32_t> PageTable::tail_cells(std::uint32_t stream) const {
  std::vector<std::int32_t> cells;
  for (const TailToken& token : streams_[stream].tail) {
    cells.push_back(token.cell);
  }
  return cells;
}

std::vector<std::int32_t> PageTable::restored_cells(std::uint32_t stream) const {
  std::vector<std::int32_t> cells;
  for (const TailToken& token : streams_[stream].restored) {
    cells.push_back(token.cell);
  }
  return cells;
}

}  // namespace zipcache::cuda
