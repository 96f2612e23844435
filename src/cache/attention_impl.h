// The plan and buffers of one attention step (private to attention.cc and attention_tile.cc).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/aligned.h"
#include "base/task_team.h"
#include "cache/attention.h"
#include "cache/sealer.h"
#include "cache/segment_math.h"
#include "cache/softmax_state.h"

namespace zipcache::cache {

// How much of a segment the tokens of a tile see.
enum class Sight : std::uint8_t { kNone, kSome, kAll };

struct Attention::Impl {
  // Per-thread buffers.
  struct Worker {
    SegmentScratch segment;
    AlignedVector<float> q;              // [rows, key_dim], scaled to base 2
    AlignedVector<float> probe_q;        // [rows, key_dim]: the rows of probes only
    std::vector<float> lse;              // [rows]
    std::vector<float> row_mass;         // [max_tokens]: one row's, over the heads of a group
    std::vector<std::uint32_t> tokens;   // tokens of the step whose rows are in q or probe_q
    AlignedVector<float> logits;         // [rows, logits_stride]
    AlignedVector<float> state;          // SoftmaxState of a span
    AlignedVector<float> total;          // SoftmaxState of all spans
    std::vector<std::uint64_t> seen;     // [tile tokens, words]: token order
    std::vector<std::uint64_t> by_slot;  // the same in slot order of a head
    std::vector<std::uint32_t> order;
  };

  explicit Impl(const kernels::KernelTable* table) : kernels(*table) {}

  const kernels::KernelTable& kernels;
  LayerCache* cache = nullptr;
  Query query;

  std::uint32_t n_kv_heads = 0, group = 0;  // query heads per KV head
  std::uint32_t tile_tokens = 0, n_tiles = 0, max_rows = 0;
  std::vector<std::uint32_t> segments;    // blocks, then pages
  std::vector<std::uint32_t> span_begin;  // into segments; ends with segments.size()
  std::uint32_t first_page = 0;           // into segments
  std::uint32_t max_tokens = 0;           // of a segment
  std::size_t logits_stride = 0;
  bool split = false;  // one unit per span instead of one per tile
  std::size_t state_floats = 0;
  AlignedVector<float> partial;  // split: [kv head, tile, span, state_floats]
  std::unique_ptr<std::atomic<std::uint32_t>[]> spans_done;  // split: [kv head, tile]
  std::size_t n_tickets = 0;
  std::atomic<std::uint32_t> next_unit{0};
  std::uint32_t n_units = 0;
  std::vector<Worker> workers;

  std::atomic<std::uint32_t> n_running{0};  // threads in run_together() before commit()
  TaskTeam team;

  std::optional<Sealer> sealer;  // while a step is at work that may seal
  SealerScratch sealer_scratch;
  std::vector<Probe> probes;              // ascending rows
  std::vector<std::uint32_t> tile_probe;  // first probe of each tile; ends with probes.size()
  std::vector<std::uint32_t>
      mass_tile;                      // tile -> its row in `mass`, tiles without probes share none
  std::vector<std::uint32_t> ranked;  // segments whose tokens receive mass: pages, then blocks
  std::vector<std::size_t> ranked_begin;  // first token of each; ends with their number
  std::vector<float> mass;                // [tiles with probes, kv head, tokens of ranked segments]
  std::vector<float> squares;             // as mass; empty unless the metric asks
  std::vector<float> total_mass, total_squares;  // [kv head]

  std::uint32_t n_spans() const { return static_cast<std::uint32_t>(span_begin.size()) - 1; }
  std::uint32_t n_pages() const { return static_cast<std::uint32_t>(segments.size()) - first_page; }
  const Segment& segment(std::uint32_t i) const { return cache->segments()[segments[i]]; }
  std::uint32_t tile_size(std::uint32_t tile) const {
    return std::min(tile_tokens, query.n_rows - tile * tile_tokens);
  }

  Status commit(TaskTeam* helpers);
  void add_probe_mass();
  void list_segments();
  void plan_tiles(std::uint32_t n_threads);
  void plan_probes();
  void run_unit(std::uint32_t unit, Worker& worker) const;
  void load_queries(std::uint32_t head, std::uint32_t tile, Worker& worker) const;
  Sight look(const Segment& segment, Worker& worker) const;
  void segment_logits(const Segment& segment, std::uint32_t head, const float* q,
                      Worker& worker) const;
  const std::uint64_t* sight_by_slot(const Segment& segment, std::uint32_t head,
                                     Worker& worker) const;
  void mask_logits(const Segment& segment, std::uint32_t head, Worker& worker) const;
  void attend_span(std::uint32_t head, std::uint32_t span, Worker& worker,
                   SoftmaxState state) const;
  void finish_tile(std::uint32_t head, std::uint32_t tile, Worker& worker,
                   SoftmaxState total) const;
  void probe_mass(std::uint32_t head, std::uint32_t tile, Worker& worker) const;
  SoftmaxState state_at(float* data, std::size_t n_rows) const {
    return {data, n_rows, cache->value_dim()};
  }
  std::size_t mass_begin(std::uint32_t tile, std::uint32_t head) const {
    return (std::size_t{mass_tile[tile]} * n_kv_heads + head) * ranked_begin.back();
  }
};

}  // namespace zipcache::cache
