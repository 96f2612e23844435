// LayerCache: the K and V of one layer (and one stream) of a running model.
//
// Tokens live in CELLS, the slots of the host engine. New tokens are staged as exact fp16 rows in
// pages; what a step leaves there may be packed to 8 bits. The policy seals staged tokens, oldest
// first, into immutable blocks. Any cell may be overwritten, copied, rotated or read at any time,
// sealed or not; the engine's mask says who sees it (cache/visibility.h). Attention over the cache:
// cache/attention.h.
//
// A row is all KV heads of a token: keys [n_kv_heads, key_dim], values [n_kv_heads, value_dim].
// Not thread-safe; Attention::run() alone may be called by several threads at once.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/expected.h"
#include "base/half.h"
#include "base/task_team.h"
#include "cache/bytes.h"
#include "cache/staging_page.h"
#include "format/block.h"
#include "policy/policy.h"

namespace zipcache::cache {

// Rows given by the engine: row i at data + i * stride_bytes.
struct RowsView {
  const void* data = nullptr;
  std::size_t stride_bytes = 0;
  bool is_half = false;  // fp16, else float
};

// A packed block. Immutable but for liveness (and rotation of keys).
struct SealedBlock {
  std::shared_ptr<const format::BlockLayout> layout;
  AlignedVector<std::byte> bytes;
  std::uint32_t first_cell = 0;  // cells first_cell .. + n_tokens - 1, unless `cells` is set
  // Ascending, token order; empty when contiguous. After a compaction dead fillers at the end
  // repeat the last one.
  std::vector<std::uint32_t> cells;
  std::vector<bool> dead;  // overwritten since; empty when all are live
  std::uint32_t n_live = 0;
  std::uint32_t group = kNoGroup;
  std::uint32_t end_ordinal = 0;  // tokens of its group up to its newest one
  bool holds_values = false;      // values are exact for now, to be quantized later
  // Where tokens are evicted: [n_kv_heads, class 0] attention received, by slot.
  std::vector<float> mass;
  std::uint32_t mass_slots() const {
    return mass.empty() ? 0 : layout->class_tokens(Tensor::kKey, 0);
  }

  std::uint32_t n_tokens() const { return layout->shape().n_tokens; }
  std::uint32_t cell(std::uint32_t token) const {
    return cells.empty() ? first_cell + token : cells[token];
  }
  bool is_dead(std::uint32_t token) const { return !dead.empty() && dead[token]; }
};

// Either a page or a block.
struct Segment {
  std::unique_ptr<StagingPage> page;
  std::unique_ptr<SealedBlock> block;
};

// Tokens that follow each other in one sequence, as far as the masks tell (cache/sealer.h).
struct TokenGroup {
  std::uint32_t id = kNoGroup;
  std::uint32_t tail_cell = kNoCell;  // its newest token
  std::uint32_t n_tokens = 0;         // tokens so far: the ordinal of the next one
  // Policies that balance keys: [key_row] max |q| per channel of each KV head until the first
  // sealing, from then on the factors of its keys.
  std::vector<float> query_max{}, key_factors{};
  // Policies with wide channels: [key_row] mean of q^2 per channel of each KV head, over its
  // tokens, in eighths of octaves: 2^((code - 128) / 8), 0 = none.
  std::vector<std::uint8_t> query_power{};
};

class LayerCache {
 public:
  struct Shape {
    std::uint32_t layer = 0;
    std::uint32_t n_cells = 0;    // capacity; costs nothing until used
    std::uint32_t key_row = 0;    // n_kv_heads * key_dim
    std::uint32_t value_row = 0;  // n_kv_heads * value_dim
  };

  // `policy` and `budget` are shared by the layers of a context and not null.
  LayerCache(const Shape& shape, std::shared_ptr<const policy::Policy> policy,
             std::shared_ptr<Budget> budget);
  ~LayerCache();
  LayerCache(const LayerCache&) = delete;
  LayerCache& operator=(const LayerCache&) = delete;

  const Shape& shape() const { return shape_; }
  const policy::Policy& policy() const { return *policy_; }

  // How rows split into heads; engines tell it with the first attention. kUnsupported when the rows
  // do not split so or differ from an earlier call, or when head_dim is no multiple of 16 in
  // [16, 512].
  Status set_heads(std::uint32_t n_kv_heads, std::uint32_t key_dim, std::uint32_t value_dim);
  std::uint32_t n_kv_heads() const { return n_kv_heads_; }
  std::uint32_t key_dim() const { return key_dim_; }
  std::uint32_t value_dim() const { return value_dim_; }

  // Time that saliency and sealing took so far.
  void add_policy_time(std::chrono::nanoseconds time) { policy_time_ += time; }
  std::chrono::nanoseconds policy_time() const { return policy_time_; }

  // Writes rows[i] to cells[i]. Writing a key makes the cell a new token (statistics start anew);
  // keys and values of a token may come in either order. A sealed cell becomes staged again.
  // kOutOfMemory: cells before the failing one are written, the others are as before.
  // REQUIRES: cells < n_cells.
  Status put(Tensor tensor, std::span<const std::uint32_t> cells, const RowsView& rows);

  // Reads rows [first_cell, first_cell + n) as fp16 into out [n, key_row or value_row]: exact for
  // tokens of the step, dequantized for packed and sealed ones, zero for cells never written or
  // evicted (for heads that evicted the token, if only some did).
  void get(Tensor tensor, std::uint32_t first_cell, std::uint32_t n, Half* out) const;

  // Calls rotate(cells, keys) with keys [n, key_row] float of every token held, page by page and
  // block by block, and stores what it leaves there. Blocks for which it returns false are left
  // alone; the others are quantized anew with their classes kept.
  using Rotate = std::function<bool(std::span<const std::uint32_t> cells, float* keys)>;
  void rotate_keys(const Rotate& rotate);

  // Forgets everything.
  void clear();
  // Becomes a copy of `other` (same shape and policy).
  Status copy_from(const LayerCache& other);

  ByteCount bytes() const;
  bool empty() const { return n_live_ == 0; }

  // The cells of the latest put() of keys, in its order: the tokens of the current step.
  std::span<const std::uint32_t> newest_cells() const { return newest_cells_; }

  // For Attention and sealing (this room only).
  const std::vector<Segment>& segments() const { return segments_; }
  StagingPage* page(std::uint32_t segment) { return segments_[segment].page.get(); }

  struct Slot {
    std::uint32_t segment = UINT32_MAX;
    std::uint32_t index = 0;  // slot of a page, token of a block
    bool found() const { return segment != UINT32_MAX; }
  };
  Slot find(std::uint32_t cell) const;

  // Packs staged tokens (page slots, any order) as one block; tiers [n_kv_heads, n] in the order of
  // `slots`, counts as in quant::encode_block. The slots become free; call settle_staging() at the
  // end of the step.
  struct SealAs {
    format::BlockShape shape;
    std::uint32_t group = kNoGroup;
    std::uint32_t end_ordinal = 0;  // see SealedBlock
    bool holds_values = false;
    std::vector<float> mass{};             // see SealedBlock
    std::span<const float> key_factors{};  // [key_row], where the shape's keys have given ones
    std::span<const float> key_weights{};  // [key_row] or empty, see quant::TensorRules
  };
  Status seal(std::span<const Slot> slots, const SealAs& as, std::span<const std::uint8_t> tiers,
              TaskTeam* team = nullptr);
  // Packs staged tokens into a block that is there, behind its own and on its grids; `added`: their
  // shape alone, `tiers` as in seal(). REQUIRES: format::joined_shape() has a shape, all tokens of
  // the block are alive, and the new ones' cells come after its last one.
  Status append(std::uint32_t segment, std::span<const Slot> slots, const format::BlockShape& added,
                std::uint32_t end_ordinal, std::span<const std::uint8_t> tiers,
                TaskTeam* team = nullptr);
  // Quantizes the values of a block that held them exact; `value` is their format from now on.
  Status seal_values(std::uint32_t segment, const format::TensorFormat& value);
  // Evicts a staged token for all heads: its cell holds nothing, but counts as a live token.
  void evict(const Slot& slot);
  SealedBlock* block(std::uint32_t segment) { return segments_[segment].block.get(); }
  // Dequantizes a block's live tokens back into staging (published mode: quantize everything anew).
  // Returns their slots, ascending cells; *tiers becomes [n_kv_heads, n].
  Expected<std::vector<Slot>> unseal(std::uint32_t segment, std::vector<std::uint8_t>* tiers);
  // At the end of a step: packs what waits if the policy says so, and moves staged tokens so that
  // no page but the last of a kind has free slots. What there is no memory for stays as it is.
  void settle_staging();
  // Copies the codes of blocks of which half or less is alive into smaller ones. What can't be
  // copied (no memory, slots shared over heads) stays as it is.
  void compact_blocks();

 private:
  static constexpr std::uint16_t kNoOwner = UINT16_MAX;
  static constexpr std::uint16_t kEvicted = UINT16_MAX - 1;
  static constexpr std::uint32_t kMapCells = 64;  // cells per lazily made piece of the owner map

  void make_owner_map(std::uint32_t cell);
  std::uint16_t owner(std::uint32_t cell) const;
  void set_owner(std::uint32_t cell, std::uint16_t segment);
  Expected<std::uint32_t> new_segment();
  Expected<Slot> stage(std::uint32_t cell);          // a free slot, zero rows
  Expected<Slot> restore_exact(std::uint32_t cell);  // a sealed or packed token, into staging
  Expected<Slot> restage(std::uint32_t cell, std::uint32_t token, std::uint32_t group,
                         const std::vector<float>& keys, const std::vector<float>& values);
  void release(std::uint32_t cell);
  void free_segment(std::uint32_t segment);
  std::shared_ptr<const format::BlockLayout> layout_for(const format::BlockShape& shape);
  void drop_unused_layouts();
  StagingPage::Shape page_shape(std::uint32_t capacity, bool packed) const;
  std::size_t new_page_bytes() const { return page_shape(kPageTokens, false).bytes(); }
  std::uint32_t fitting(std::uint32_t n_tokens) const;
  Expected<std::uint32_t> make_page(std::uint32_t capacity, bool packed);
  Status resize_page(std::uint32_t id, std::uint32_t capacity);
  Expected<std::uint32_t> packed_page_with_room(std::uint32_t n_tokens);
  Status pack_staged();
  Status compact_pages(bool packed);
  void move_token(std::uint32_t from_page, std::uint32_t slot, std::uint32_t to_page);
  bool packs() const { return policy_->staging_bits == 8; }
  bool is_exact(const Slot& slot) const {
    const StagingPage* page = segments_[slot.segment].page.get();
    return page != nullptr && !page->shape.packed;
  }
  void write_row(Tensor tensor, const Slot& slot, const RowsView& rows, std::size_t row);
  void read_staged(const Slot& slot, Tensor tensor, float* row) const {
    segments_[slot.segment].page->read(tensor, slot.index, row);
  }
  struct Gathered {
    std::vector<std::uint32_t> cells;  // ascending: the order of the others
    std::vector<std::uint8_t> tiers;
    std::unique_ptr<float[]> keys, values;
    std::size_t n_keys = 0, n_values = 0;
    std::span<const float> key_rows() const { return {keys.get(), n_keys}; }
    std::span<const float> value_rows() const { return {values.get(), n_values}; }
  };
  Gathered gather(std::span<const Slot> slots, std::span<const std::uint8_t> tiers,
                  TaskTeam* team) const;
  void move_cells(std::span<const std::uint32_t> cells, std::uint32_t segment);
  // Row i of both is that of slots[order[i]].
  void read_staged(std::span<const Slot> slots, std::span<const std::uint32_t> order, float* keys,
                   float* values, TaskTeam* team) const;
  std::vector<float> decode(std::uint32_t segment, Tensor tensor) const;
  void compact_block(SealedBlock& block);

  Shape shape_;
  std::shared_ptr<const policy::Policy> policy_;
  std::shared_ptr<Budget> budget_;
  std::uint32_t n_kv_heads_ = 0, key_dim_ = 0, value_dim_ = 0;

  std::vector<Segment> segments_;  // stable ids; a freed one is reused
  std::vector<std::unique_ptr<std::uint16_t[]>> owners_;
  std::vector<std::shared_ptr<const format::BlockLayout>> layouts_;
  std::vector<std::uint32_t> newest_cells_;
  std::vector<float> moved_row_;  // scratch, kept so that a step need not allocate
  std::vector<TokenGroup> groups_;
  std::uint32_t open_page_ = UINT32_MAX;  // a page that may have free slots
  std::uint32_t next_arrival_ = 0;
  std::uint32_t next_group_ = 0;
  std::uint64_t n_live_ = 0;
  std::chrono::nanoseconds policy_time_{0};
  bool lost_sealed_tokens_ = false;  // since the last compact_blocks()
  std::uint64_t n_evicted_ = 0;      // cells that hold nothing but were not overwritten
  friend class Sealer;
};

}  // namespace zipcache::cache
