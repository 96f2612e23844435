// The policy at work on one cache: which sequence the new tokens belong to, which query rows are
// probes, and what is sealed at the end of a step.
//
// The engine never names sequences; the mask does. A new token joins the group whose newest token
// it sees. Where that token is hidden (a rollback, a second branch of a shared prompt) a new group
// takes over the staged tokens that are visible. So tokens of different sequences never share a
// block.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/expected.h"
#include "cache/layer_cache.h"
#include "cache/visibility.h"

namespace zipcache::cache {

// A query row whose attention counts as saliency; `weight` > 1 when drawn repeatedly.
struct Probe {
  std::uint32_t row = 0;
  float weight = 1.0f;
};

// Buffers of a Sealer, kept from step to step so that a step need not allocate.
struct SealerScratch {
  struct StepGroup {
    std::uint32_t id;
    std::uint32_t ordinal;    // tokens of the group before this step
    std::uint32_t n_rows;     // its rows in this step
    std::uint32_t first_row;  // into `rows`
  };
  std::vector<StepGroup> groups;
  std::vector<std::uint32_t> group_of_row;  // row of the step -> index into `groups`
  std::vector<std::uint32_t> rows;          // group by group, ascending
  std::vector<std::uint32_t> chosen;        // probes of a group
  std::vector<float> weights;               // [rows of the step]
  std::vector<float> query_sums;            // [key_row]: of q^2, of a group
};

class Sealer {
 public:
  // `scratch` outlives the sealer.
  Sealer(LayerCache& cache, SealerScratch& scratch) : cache_(cache), scratch_(scratch) {}

  // Gives the tokens in newest_cells() (row i of the step = newest_cells()[i], row first_row + i of
  // `visible`) their groups and picks the probes, ascending by row.
  void begin_step(const Visibility& visible, std::uint32_t first_row, std::vector<Probe>* probes);

  // Query rows of this step, of which some policies keep statistics. `q` as in cache::Query.
  void observe_queries(const float* q, std::size_t row_stride, std::size_t head_stride,
                       std::uint32_t heads_per_group);

  // Adds the probe attention of one staged token: mass [n_kv_heads], seen = probes that see it;
  // squares as mass, nullptr unless needs_squares().
  void add_mass(const LayerCache::Slot& slot, const float* mass, const float* squares,
                std::uint32_t seen);
  bool needs_squares() const { return cache_.policy().metric == saliency::Metric::kRoco; }

  // Seals what the policy wants of the groups of this step.
  Status end_step(TaskTeam* helpers = nullptr);

 private:
  using StepGroup = SealerScratch::StepGroup;
  using Slots = std::vector<LayerCache::Slot>;

  TokenGroup& group_for(const Visibility& visible, std::uint32_t row);
  TokenGroup& take_over(const Visibility& visible, std::uint32_t row);
  bool holds_tail(const TokenGroup& group) const;
  bool keeps_last_row_only() const;
  std::uint64_t random_seed(const LayerCache::Slot& first, std::uint32_t head);
  StagedToken& token(const LayerCache::Slot& slot);
  void choose_probes(std::vector<Probe>* probes);
  // Staged tokens of a group, sinks left out: how many, and which, oldest first.
  std::uint32_t count_staged(std::uint32_t group) const;
  Slots staged(std::uint32_t group) const;
  Status seal_group(const StepGroup& group);
  // The newest block of a group if `slots`, in cells behind its own, can join it, and their shape.
  struct Joins {
    std::uint32_t segment;
    format::BlockShape added;
  };
  std::optional<Joins> block_to_join(std::uint32_t group, std::span<const LayerCache::Slot> slots);
  // Tiers [n_kv_heads, n] of staged tokens that come into a block of this layout.
  std::vector<std::uint8_t> rank(std::span<const LayerCache::Slot> oldest_first,
                                 std::uint32_t n_after, const format::BlockLayout& layout);
  Status evict_group(const StepGroup& group);
  // n_after: tokens of the group after the block's.
  Status seal_block(std::span<const LayerCache::Slot> oldest_first, std::uint32_t n_after,
                    std::uint32_t group);
  Status seal_held_values(std::uint32_t group);
  TokenGroup& find_group(std::uint32_t id);
  void add_query_power(TokenGroup& group, const StepGroup& step,
                       std::uint32_t heads_per_group) const;
  static std::vector<float> channel_weights(const TokenGroup& group);  // [key_row], or empty
  void balance_keys(TokenGroup& group, const Slots& staged);
  Status gather_sealed(std::uint32_t group, format::BlockShape* shape, Slots* slots,
                       std::vector<std::uint8_t>* tiers);

  LayerCache& cache_;
  SealerScratch& scratch_;
  TaskTeam* helpers_ = nullptr;
};

}  // namespace zipcache::cache
