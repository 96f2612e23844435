// Where the tokens of a group of layers are: which cells are sealed in which pages, which are still
// in the fp16 tails, and what a step does to them. Counts follow from the policy alone, so all
// layers of the group share one table, and no decision waits for the device. Pure host logic.
//
// A sequence here is a stream of the engine. A step brings n new tokens of each of some streams;
// the mask's summary says which cells their rows see. Cells are slots: one that is written again
// was given up by its old token, whose slot in a page becomes dead.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/expected.h"
#include "cache/cuda/device_policy.h"
#include "cache/cuda/range_allocator.h"
#include "kernels/cuda/window_kernels.h"
#include "policy/policy.h"

namespace zipcache::cuda {

inline constexpr int kProbeRing = 32;  // queries of decode steps that are kept as probes

// Tokens that were sealed together. Of every KV head `classes.n_pages()` pages.
struct PagedBlock {
  std::uint64_t serial = 0;
  std::uint32_t n_tokens = 0;
  std::uint32_t n_live = 0;
  std::vector<std::int32_t> cells;  // [n_tokens], -1: dead
  BlockClasses classes;
  std::vector<PageEntry> pages;           // [n_kv_heads, n_pages]
  std::vector<std::uint32_t> page_begin;  // its allocations, units before interleaving
  std::uint32_t first_set = 0;            // of scale sets [n_kv_heads, n_key_sets]
  std::uint32_t first_rank = 0;           // of ranks [n_kv_heads, n_pages * kPageTokens]
  std::uint32_t first_cell = 0;           // of its cells in the shared list
  std::shared_ptr<int> n_owners;          // blocks with these pages: those of copied streams share
  std::uint32_t rank_stride() const { return classes.n_pages() * kPageTokens; }
};

struct TableShape {
  std::uint32_t n_layers = 0;
  std::uint32_t n_streams = 0;
  std::uint32_t n_cells = 0;
  std::uint32_t n_kv_heads = 0;
  std::uint32_t head_dim = 0;
  std::uint32_t layer = 0;  // of the model, the group's first: seeds the probes
};

// What the rows of a step see, [n_streams of the step, n_cells]; see MaskSummaryParams.
struct StepInput {
  std::uint32_t first_stream = 0;
  std::uint32_t n_streams = 0;
  std::uint32_t n_per_stream = 0;
  std::uint32_t n_cells = 0;                 // of the mask
  std::span<const std::int64_t> rows;        // [n_streams, n_per_stream]: stream * n_cells + cell
  std::span<const std::uint8_t> flags;       // [n_streams, n_cells]
  std::span<const std::int32_t> row_counts;  // [n_streams, n_per_stream]
  bool needs_window = false;  // attention of a kind that only the window path computes
};

// What one stream does in a step. "Window" positions count its unsealed tokens: sinks first.
struct StreamStep {
  std::uint32_t stream = 0;
  std::vector<std::int32_t> gather_from, gather_to;      // tail -> window, before anything else
  std::vector<std::int32_t> restored_from, restored_to;  // slots of restore() -> window
  std::vector<std::int32_t> place;         // of the new tokens: in the window or the tail
  std::vector<std::int32_t> window_cells;  // [window]; of a decode step that seals, too
  std::vector<std::shared_ptr<const PagedBlock>> visible;  // blocks that some row sees
  std::vector<std::int32_t> probe_rows, probe_positions;   // window path: of the new tokens
  // The power of the queries goes on from the step before; false: the sequence is new.
  bool adds_query_power = false;
  int ring_slot = -1, last_ring_slot = -1;  // decode path
  int ring_first = kProbeRing;              // decode path that seals: first valid slot
  struct Seal {
    std::uint32_t window_begin = 0;
    std::shared_ptr<const PagedBlock> block;
    bool is_first = false;  // of its stream: its values' factors hold for all that follow
  };
  std::vector<Seal> seals;
  std::vector<std::int32_t> keep_from, keep_to;  // window -> tail, after everything else
  std::uint32_t n_tail_in_decode = 0;            // decode path: tail with the new token
};

struct Step {
  bool is_decode =
      false;  // one new token per stream, all live tokens visible: the tail grows by it
  std::uint32_t first_stream = 0;
  std::uint32_t n_per_stream = 0;
  std::vector<StreamStep> streams;
};

class PageTable {
 public:
  // `policy` as device_policy() returned it.
  PageTable(const TableShape& shape, const policy::Policy& policy);

  // Plans the step and takes it as done. An error leaves the table as it was.
  Expected<Step> begin_step(const StepInput& input);

  void clear();
  // Of a stream: nothing is known of its cells any more.
  void clear_stream(std::uint32_t stream);
  // `to` holds what `from` holds, in the same pages.
  void copy_stream(std::uint32_t from, std::uint32_t to);

  // Gives the stream's block pages of its own, if it shares them. Returns the block as it was,
  // whose pages' contents are to be copied before anything else; nothing if it has its own.
  std::optional<PagedBlock> own_pages(std::uint32_t stream, std::size_t block);

  // Cells get rows from outside of a step; what they held is given up. Returns their slots among
  // the stream's restored rows: its next step takes these into its window, and they are no more.
  std::vector<std::int32_t> restore(std::uint32_t stream, std::span<const std::int32_t> cells);

  // Where the tokens of a stream are: cells by place in the tail and by slot, < 0: none.
  bool holds(std::uint32_t stream, std::uint32_t cell) const {
    return held_[std::size_t{stream} * shape_.n_cells + cell];
  }
  std::vector<std::int32_t> tail_cells(std::uint32_t stream) const;
  std::vector<std::int32_t> restored_cells(std::uint32_t stream) const;
  const std::vector<std::shared_ptr<PagedBlock>>& blocks(std::uint32_t stream) const {
    return streams_[stream].blocks;
  }
  // Changes with everything that changes the table.
  std::uint64_t version() const { return version_; }

  const TableShape& shape() const { return shape_; }
  const policy::Policy& policy() const { return policy_; }
  const std::array<PageClass, kPolicyClasses>& classes() const { return classes_; }
  // Some pages have wide channels of keys, which are chosen by the queries' power.
  bool has_wide_channels() const;
  std::uint64_t live_tokens() const;
  std::uint64_t sealed_tokens() const;

  // Sizes that the device memory must have, for every layer.
  std::uint64_t pool_bytes() const;  // of all layers, interleaved
  std::uint32_t n_sets() const { return sets_.end(); }
  std::uint32_t n_ranks() const { return ranks_.end(); }
  std::uint32_t streams_in_use() const { return streams_in_use_; }
  // Cells of all blocks, by PagedBlock::first_cell; changes when cells die.
  std::span<const std::int32_t> block_cells() const { return block_cells_; }
  std::uint64_t block_cells_version() const { return cells_version_; }
  // Bytes between the pools of two layers.
  std::uint32_t layer_bytes() const { return chunk_units_ * kTileAlignment; }

 private:
  struct TailToken {
    std::int32_t cell = -1;  // -1: given up
    bool is_sink = false;
  };
  struct Stream {
    std::vector<TailToken> tail;
    std::vector<TailToken> restored;         // by slot
    std::vector<std::int32_t> slot_of_cell;  // [n_cells], -1: not restored; or empty
    std::vector<std::shared_ptr<PagedBlock>> blocks;
    std::uint32_t n_seen = 0;  // tokens that came so far: seeds the probes
    bool has_factors = false;
    bool has_query_power = false;
    int ring_first = kProbeRing;  // first slot of the ring that is valid
    int last_ring_slot = -1;
    // The mask's flags after a decode step: with the next token's cell they are the next step's.
    std::vector<std::uint8_t> decode_flags;
  };

  Status check(const StepInput& input) const;
  bool fits_decode(const StepInput& input);
  bool sees_all(const Stream& stream, std::span<const std::uint8_t> flags,
                std::int32_t new_cell) const;
  void give_up(Stream& stream, std::int32_t cell);
  StreamStep plan_stream(const StepInput& input, std::uint32_t index, bool is_decode);
  std::shared_ptr<PagedBlock> new_block(std::span<const std::int32_t> cells);
  void free_block(const PagedBlock& block);

  TableShape shape_;
  policy::Policy policy_;
  std::array<PageClass, kPolicyClasses> classes_;
  std::uint32_t chunk_units_;
  RangeAllocator units_, sets_, ranks_, cells_;
  std::vector<std::int32_t> block_cells_;
  std::uint64_t cells_version_ = 0;
  std::uint64_t next_serial_ = 1;
  std::uint64_t version_ = 0;
  std::uint32_t streams_in_use_ = 0;
  std::vector<Stream> streams_;
  std::vector<bool> held_;  // [n_streams, n_cells]
};

}  // namespace zipcache::cuda
