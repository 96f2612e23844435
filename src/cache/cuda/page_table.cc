#include "cache/cuda/page_table.h"

#include <algorithm>
#include <string>
#include <utility>

#include "saliency/probes.h"

namespace zipcache::cuda {
namespace {

constexpr std::uint32_t kChunkBytes = 128 << 10;  // of a layer at a time
constexpr std::uint32_t kMaxSets = 65536;         // PageEntry::set

}  // namespace

PageTable::PageTable(const TableShape& shape, const policy::Policy& policy)
    : shape_(shape),
      policy_(policy),
      classes_(page_classes(policy, static_cast<int>(shape.head_dim))),
      chunk_units_(kChunkBytes / kTileAlignment),
      units_(chunk_units_),
      streams_(shape.n_streams),
      held_(std::size_t{shape.n_streams} * shape.n_cells) {}

bool PageTable::has_wide_channels() const {
  return std::ranges::any_of(classes_, [](PageClass cls) { return cls.wide_chunks > 0; });
}

Status PageTable::check(const StepInput& in) const {
  if (in.rows.size() != std::size_t{in.n_streams} * in.n_per_stream ||
      in.first_stream + in.n_streams > shape_.n_streams) {
    return unsupported("ZipCacheCUDA: a step brings " + std::to_string(in.rows.size()) +
                       " tokens for " + std::to_string(in.n_streams) + " streams of " +
                       std::to_string(in.n_per_stream) + " rows; supported: the same number each");
  }
  for (std::size_t i = 0; i < in.rows.size(); ++i) {
    const auto stream = in.first_stream + static_cast<std::int64_t>(i / in.n_per_stream);
    const std::int64_t cell = in.rows[i] - stream * shape_.n_cells;
    if (cell < 0 || cell >= shape_.n_cells || cell >= in.n_cells) {
      return invalid_argument("ZipCacheCUDA: row " + std::to_string(in.rows[i]) +
                              " lies outside stream " + std::to_string(stream));
    }
  }
  return ok_status();
}

// One token per stream, and its row sees all that the stream holds and that is in a visible block.
bool PageTable::fits_decode(const StepInput& in) {
  if (in.n_per_stream != 1 || in.needs_window) {
    return false;
  }
  for (std::uint32_t s = 0; s < in.n_streams; ++s) {
    Stream& stream = streams_[in.first_stream + s];
    const auto flags = in.flags.subspan(std::size_t{s} * in.n_cells, in.n_cells);
    const auto new_cell = static_cast<std::int32_t>(in.rows[s] % shape_.n_cells);
    if (stream.tail.size() >= kTailTokens || !stream.restored.empty()) {
      return false;
    }
    // As after the step before, and one cell more: a comparison, not a search (33,000 cells a
    // step).
    std::vector<std::uint8_t>& known = stream.decode_flags;
    if (!known.empty()) {
      known.resize(in.n_cells);
      if (known[new_cell] == 0) {
        known[new_cell] = kSeenByAny | kSeenByAll;
        if (std::equal(known.begin(), known.end(), flags.begin())) {
          continue;
        }
      }
      known.clear();
    }
    if (!sees_all(stream, flags, new_cell)) {
      return false;
    }
    known.assign(flags.begin(), flags.end());
  }
  return true;
}

bool PageTable::sees_all(const Stream& stream, std::span<const std::uint8_t> flags,
                         std::int32_t new_cell) const {
  const auto seen = [&](std::int32_t cell) {
    return static_cast<std::uint32_t>(cell) < flags.size() && (flags[cell] & kSeenByAny) != 0;
  };
  if (!seen(new_cell)) {
    return false;
  }
  for (const TailToken& token : stream.tail) {
    if (token.cell == new_cell || token.cell < 0 || !seen(token.cell)) {
      return false;
    }
  }
  const auto still_seen = [&](std::int32_t cell) { return cell != new_cell && seen(cell); };
  return std::all_of(stream.blocks.begin(), stream.blocks.end(), [&](const auto& block) {
    return std::none_of(block->cells.begin(), block->cells.end(), still_seen) ||
           (block->n_live == block->n_tokens &&
            std::all_of(block->cells.begin(), block->cells.end(), still_seen));
  });
}

// The cell is written again.
void PageTable::give_up(Stream& stream, std::int32_t cell) {
  if (!stream.slot_of_cell.empty() && stream.slot_of_cell[cell] >= 0) {
    stream.restored[std::exchange(stream.slot_of_cell[cell], -1)].cell = -1;
    return;
  }
  for (TailToken& token : stream.tail) {
    if (token.cell == cell) {
      token.cell = -1;
      return;
    }
  }
  for (auto it = stream.blocks.begin(); it != stream.blocks.end(); ++it) {
    PagedBlock& block = **it;
    const auto found = std::find(block.cells.begin(), block.cells.end(), cell);
    if (found == block.cells.end()) {
      continue;
    }
    *found = -1;
    block_cells_[block.first_cell + (found - block.cells.begin())] = -1;
    ++cells_version_;
    if (--block.n_live == 0) {
      free_block(block);
      stream.blocks.erase(it);
    }
    return;
  }
}

Expected<Step> PageTable::begin_step(const StepInput& in) {
  if (Status ok = check(in); !ok) {
    return ok.error();
  }
  std::size_t n_rows = in.rows.size();
  for (std::uint32_t s = 0; s < in.n_streams; ++s) {
    n_rows += streams_[in.first_stream + s].restored.size();
  }
  if (sets_.end() + std::uint64_t{shape_.n_kv_heads} * 2 * (n_rows / kPageTokens + 1) > kMaxSets) {
    return unsupported(
        "ZipCacheCUDA: the cache holds " + std::to_string(sets_.end()) +
        " scale sets, supported up to 65536; raise ZIPCACHE_BLOCK or shorten the context");
  }
  ++version_;
  Step step;
  step.is_decode = fits_decode(in);
  step.first_stream = in.first_stream;
  step.n_per_stream = in.n_per_stream;
  streams_in_use_ = std::max(streams_in_use_, in.first_stream + in.n_streams);
  for (std::uint32_t s = 0; s < in.n_streams; ++s) {
    step.streams.push_back(plan_stream(in, s, step.is_decode));
  }
  return step;
}

StreamStep PageTable::plan_stream(const StepInput& in, std::uint32_t index, bool is_decode) {
  Stream& stream = streams_[in.first_stream + index];
  const std::uint8_t* const flags = in.flags.data() + std::size_t{index} * in.n_cells;
  const std::uint32_t n_new = in.n_per_stream;
  StreamStep out;
  out.stream = in.first_stream + index;

  // Several sequences may share a stream, so there may be more sinks than the policy has, as long
  // as the others still fit into the tail.
  const std::uint32_t most_sinks = kTailTokens - policy_.hold_tokens - policy_.seal_tokens;
  std::vector<TailToken> added(n_new);
  const auto is_sink = [](const TailToken& t) { return t.is_sink; };
  auto n_sinks = static_cast<std::uint32_t>(
      std::count_if(stream.tail.begin(), stream.tail.end(), is_sink) +
      std::count_if(stream.restored.begin(), stream.restored.end(), is_sink));
  for (std::uint32_t row = 0; row < n_new; ++row) {
    const std::size_t at = std::size_t{index} * n_new + row;
    added[row].cell = static_cast<std::int32_t>(in.rows[at] % shape_.n_cells);
    const std::size_t held = std::size_t{out.stream} * shape_.n_cells + added[row].cell;
    if (held_[held]) {
      give_up(stream, added[row].cell);
    }
    held_[held] = true;
    // The row's own token counts: a sequence's first tokens see no more than themselves.
    added[row].is_sink = static_cast<std::uint32_t>(in.row_counts[at]) <= policy_.sink_tokens &&
                         n_sinks < most_sinks;
    n_sinks += added[row].is_sink;
  }
  stream.has_factors = stream.has_factors && !stream.blocks.empty();
  for (const auto& block : stream.blocks) {
    if (std::any_of(block->cells.begin(), block->cells.end(), [&](std::int32_t cell) {
          return cell >= 0 && static_cast<std::uint32_t>(cell) < in.n_cells &&
                 (flags[cell] & kSeenByAny) != 0;
        })) {
      out.visible.push_back(block);
    }
  }

  // The window: sinks, the others in the order of arrival, and last what no row sees. That is of
  // another sequence or was removed and waits to be overwritten; when a sequence starts it is
  // sealed by itself, so that it stands in nobody's way.
  const auto is_hidden = [&](const TailToken& token) {
    return static_cast<std::uint32_t>(token.cell) >= in.n_cells ||
           (flags[token.cell] & kSeenByAny) == 0;
  };
  std::vector<TailToken> window;
  std::vector<std::int32_t> new_position(n_new);
  std::vector<std::int32_t> from;  // by window position: place in the tail, or < 0
  std::uint32_t n_visible_sinks = 0, n_visible = 0;
  for (const int part : {0, 1, 2}) {  // sinks, others, hidden
    const auto is_of_part = [&](const TailToken& token) {
      return token.cell >= 0 && part == (is_hidden(token) ? 2 : token.is_sink ? 0 : 1);
    };
    for (std::size_t i = 0; i < stream.tail.size(); ++i) {
      if (is_of_part(stream.tail[i])) {
        from.push_back(static_cast<std::int32_t>(i));
        window.push_back(stream.tail[i]);
      }
    }
    for (std::size_t slot = 0; slot < stream.restored.size(); ++slot) {
      if (is_of_part(stream.restored[slot])) {
        out.restored_from.push_back(static_cast<std::int32_t>(slot));
        out.restored_to.push_back(static_cast<std::int32_t>(window.size()));
        from.push_back(-1);
        window.push_back(stream.restored[slot]);
      }
    }
    for (std::uint32_t row = 0; row < n_new; ++row) {
      if (part == (added[row].is_sink ? 0 : 1)) {
        new_position[row] = static_cast<std::int32_t>(window.size());
        from.push_back(-1);
        window.push_back(added[row]);
      }
    }
    (part == 0 ? n_visible_sinks : n_visible) =
        part < 2 ? static_cast<std::uint32_t>(window.size()) : n_visible;
  }
  const auto n_window = static_cast<std::uint32_t>(window.size());
  const std::uint32_t n_kept = std::min(n_visible_sinks + policy_.hold_tokens, n_visible);
  const std::vector<std::uint32_t> seals = policy::plan_seal(policy_, n_visible - n_kept, n_new);
  const std::uint32_t n_hidden = n_window - n_visible;
  const auto counts = in.row_counts.subspan(std::size_t{index} * n_new, n_new);
  const bool starts = std::any_of(counts.begin(), counts.end(), [](int n) { return n == 1; });
  const std::uint32_t most_hidden =
      most_sinks - std::min(n_visible_sinks, most_sinks);  // what the tail has left
  const std::uint32_t n_sealed_hidden = starts || n_hidden > most_hidden ? n_hidden : 0;

  if (is_decode) {
    out.place = {static_cast<std::int32_t>(stream.tail.size())};
    out.n_tail_in_decode = static_cast<std::uint32_t>(stream.tail.size()) + 1;
    // Steps until the next sealing, this one included.
    const std::uint32_t threshold = n_visible_sinks + policy_.hold_tokens + policy_.seal_tokens;
    const int left = static_cast<int>(threshold) - static_cast<int>(n_visible);
    out.last_ring_slot = stream.last_ring_slot;
    out.ring_slot = left < kProbeRing && left >= 0 ? kProbeRing - 1 - left : -1;
    if (out.ring_slot >= 0) {
      stream.ring_first = std::min(stream.ring_first, out.ring_slot);
    }
    stream.last_ring_slot = out.ring_slot;
    out.ring_first = stream.ring_first;
    stream.tail.push_back(added[0]);
  } else {
    out.place = new_position;
    saliency::select_probes(policy_.probes, n_new, {policy_.seed, shape_.layer, stream.n_seen, {}},
                            reinterpret_cast<std::vector<std::uint32_t>*>(&out.probe_rows));
    std::erase_if(out.probe_rows,
                  [&](std::int32_t row) { return n_new > 1 && added[row].is_sink; });
    for (const std::int32_t row : out.probe_rows) {
      out.probe_positions.push_back(new_position[row]);
    }
    stream.ring_first = kProbeRing;
    stream.last_ring_slot = -1;
    stream.decode_flags.clear();
  }
  stream.n_seen += n_new;
  stream.restored.clear();
  stream.slot_of_cell.clear();
  stream.has_query_power = stream.has_query_power && !starts;
  if (is_decode && seals.empty()) {
    return out;
  }
  out.adds_query_power = stream.has_query_power;
  stream.has_query_power =
      stream.has_query_power || out.ring_first < kProbeRing || !out.probe_rows.empty();

  for (const TailToken& token : window) {
    out.window_cells.push_back(token.cell);
  }
  for (std::uint32_t i = 0; i < n_window; ++i) {
    const std::int32_t tail = from[i] >= 0 ? from[i] : is_decode ? out.place[0] : -1;
    if (tail >= 0) {
      out.gather_from.push_back(tail);
      out.gather_to.push_back(static_cast<std::int32_t>(i));
    }
  }
  std::vector<bool> is_sealed(n_window);
  const auto seal_range = [&](std::uint32_t begin, std::uint32_t n) {
    auto block = new_block(std::span(out.window_cells).subspan(begin, n));
    stream.blocks.push_back(block);
    out.seals.push_back({begin, block, !stream.has_factors});
    stream.has_factors = true;
    std::fill_n(is_sealed.begin() + begin, n, true);
  };
  std::uint32_t begin = n_visible_sinks;
  for (const std::uint32_t n : seals) {
    seal_range(begin, n);
    begin += n;
  }
  for (std::uint32_t sealed = 0; sealed < n_sealed_hidden; sealed += policy_.block_tokens) {
    seal_range(n_visible + sealed, std::min(n_sealed_hidden - sealed, policy_.block_tokens));
  }
  stream.tail.clear();
  for (std::uint32_t i = 0; i < n_window; ++i) {
    if (!is_sealed[i]) {
      out.keep_from.push_back(static_cast<std::int32_t>(i));
      out.keep_to.push_back(static_cast<std::int32_t>(stream.tail.size()));
      stream.tail.push_back(window[i]);
    }
  }
  stream.ring_first = kProbeRing;
  stream.last_ring_slot = -1;
  return out;
}

std::shared_ptr<PagedBlock> PageTable::new_block(std::span<const std::int32_t> cells) {
  auto block = std::make_shared<PagedBlock>();
  block->serial = next_serial_++;
  block->n_owners = std::make_shared<int>(1);
  block->n_tokens = block->n_live = static_cast<std::uint32_t>(cells.size());
  block->cells.assign(cells.begin(), cells.end());
  block->classes = block_classes(policy_, block->n_tokens);
  const BlockClasses& classes = block->classes;
  const auto heads = shape_.n_kv_heads;
  block->first_set = sets_.allocate(heads * classes.n_key_sets);
  block->first_rank = ranks_.allocate(heads * block->rank_stride());
  block->first_cell = cells_.allocate(block->n_tokens);
  block_cells_.resize(cells_.end(), -1);
  std::copy(cells.begin(), cells.end(), block_cells_.begin() + block->first_cell);
  ++cells_version_;
  for (std::uint32_t head = 0; head < heads; ++head) {
    for (int n = 0; n < classes.n_classes; ++n) {
      const BlockClass& cls = classes.classes[n];
      const PageClass widths = classes_[cls.cls];
      const auto size = static_cast<std::uint32_t>(
          page_bytes(static_cast<int>(shape_.head_dim), widths) / kTileAlignment);
      for (std::uint32_t begin = 0; begin < cls.n_tokens; begin += kPageTokens) {
        const std::uint32_t unit = units_.allocate(size);
        block->page_begin.push_back(unit);
        block->pages.push_back(
            {unit / chunk_units_ * chunk_units_ * shape_.n_layers + unit % chunk_units_,
             static_cast<std::uint16_t>(block->first_set + head * classes.n_key_sets + cls.key_set),
             static_cast<std::uint8_t>(std::min<std::uint32_t>(cls.n_tokens - begin, kPageTokens)),
             cls.cls});
      }
    }
  }
  return block;
}

void PageTable::free_block(const PagedBlock& block) {
  cells_.release(block.first_cell, block.n_tokens);
  if (--*block.n_owners > 0) {
    return;
  }
  for (std::size_t i = 0; i < block.pages.size(); ++i) {
    const PageClass widths = classes_[block.pages[i].cls];
    units_.release(block.page_begin[i],
                   static_cast<std::uint32_t>(
                       page_bytes(static_cast<int>(shape_.head_dim), widths) / kTileAlignment));
  }
  sets_.release(block.first_set, shape_.n_kv_heads * block.classes.n_key_sets);
  ranks_.release(block.first_rank, shape_.n_kv_heads * block.rank_stride());
}

void PageTable::clear() {
  for (std::uint32_t stream = 0; stream < streams_.size(); ++stream) {
    clear_stream(stream);
  }
  units_.clear(), sets_.clear(), ranks_.clear(), cells_.clear();
}

void PageTable::clear_stream(std::uint32_t stream) {
  ++version_;
  for (const auto& block : streams_[stream].blocks) {
    free_block(*block);
  }
  streams_[stream] = {};
  std::fill_n(held_.begin() + static_cast<std::ptrdiff_t>(std::size_t{stream} * shape_.n_cells),
              shape_.n_cells, false);
}

std::uint64_t PageTable::sealed_tokens() const {
  std::uint64_t n = 0;
  for (const Stream& stream : streams_) {
    for (const auto& block : stream.blocks) {
      n += block->n_live;
    }
  }
  return n;
}

std::uint64_t PageTable::live_tokens() const {
  std::uint64_t n = sealed_tokens();
  for (const Stream& stream : streams_) {
    const auto is_live = [](const TailToken& t) { return t.cell >= 0; };
    n += static_cast<std::uint64_t>(
        std::count_if(stream.tail.begin(), stream.tail.end(), is_live) +
        std::count_if(stream.restored.begin(), stream.restored.end(), is_live));
  }
  return n;
}

std::uint64_t PageTable::pool_bytes() const {
  const std::uint64_t chunks = (units_.end() + chunk_units_ - 1) / chunk_units_;
  return chunks * chunk_units_ * kTileAlignment * shape_.n_layers;
}

}  // namespace zipcache::cuda
