#include "cache/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "base/check.h"
#include "cache/sealer.h"
#include "cache/segment_math.h"
#include "cache/softmax_state.h"

namespace zipcache::cache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

// Query rows (tokens x heads of a group) that share one pass over a segment: enough to amortise
// unpacking, few enough that logits of a block stay in the second-level cache.
constexpr std::uint32_t kTileRows = 64;
// Segments are summed in spans of at least this many tokens, each from an empty state, then the
// spans are merged in order: the result does not depend on whether threads share a tile's spans.
constexpr std::uint32_t kSpanTokens = 1024;
// Spans of a tile go to different threads as long as their partial states fit here.
constexpr std::size_t kMaxPartialBytes = std::size_t{4} << 20;

enum class Sight : std::uint8_t { kNone, kSome, kAll };

}  // namespace

struct Attention::Impl {
  // Per-thread buffers.
  struct Worker {
    SegmentScratch segment;
    AlignedVector<float> q;              // [rows, key_dim], scaled to base 2
    AlignedVector<float> probe_q;        // [rows, key_dim]: the rows of probes only
    std::vector<float> lse;              // [rows]
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

  std::unique_ptr<Sealer> sealer;
  std::vector<Probe> probes;              // ascending rows
  std::vector<std::uint32_t> tile_probe;  // first probe of each tile; ends with probes.size()
  std::vector<std::uint32_t>
      mass_tile;            // tile -> its row in `mass`, tiles without probes share none
  std::vector<float> mass;  // [tiles with probes, kv head, pages * kPageTokens]

  std::uint32_t n_spans() const { return static_cast<std::uint32_t>(span_begin.size()) - 1; }
  std::uint32_t n_pages() const { return static_cast<std::uint32_t>(segments.size()) - first_page; }
  const Segment& segment(std::uint32_t i) const { return cache->segments()[segments[i]]; }
  std::uint32_t tile_size(std::uint32_t tile) const {
    return std::min(tile_tokens, query.n_rows - tile * tile_tokens);
  }

  void list_segments();
  void plan_tiles(std::uint32_t n_threads);
  void plan_probes();
  void run_unit(std::uint32_t unit, Worker& worker) const;
  void load_queries(std::uint32_t head, std::uint32_t tile, Worker& worker) const;
  Sight look(const Segment& segment, std::uint32_t tile, Worker& worker) const;
  void segment_logits(const Segment& segment, std::uint32_t head, const float* q,
                      Worker& worker) const;
  void mask_logits(const Segment& segment, std::uint32_t head, std::uint32_t n_tokens,
                   Worker& worker) const;
  void attend_span(std::uint32_t head, std::uint32_t tile, std::uint32_t span, Worker& worker,
                   SoftmaxState state) const;
  void finish_tile(std::uint32_t head, std::uint32_t tile, Worker& worker,
                   SoftmaxState total) const;
  void probe_mass(std::uint32_t head, std::uint32_t tile, Worker& worker) const;
  SoftmaxState state_at(float* data, std::size_t n_rows) const {
    return {data, n_rows, cache->value_dim()};
  }
  float* mass_of(std::uint32_t tile, std::uint32_t head) const {
    return const_cast<float*>(mass.data()) +
           (std::size_t{mass_tile[tile]} * n_kv_heads + head) * n_pages() * kPageTokens;
  }
};

Attention::Attention(const kernels::KernelTable* kernels)
    : impl_(std::make_unique<Impl>(kernels)) {}
Attention::~Attention() = default;

// ---- plan ------------------------------------------------------------------------------------

Status Attention::prepare(LayerCache& cache, const Query& query, std::uint32_t n_threads) {
  Impl& m = *impl_;
  ZC_CHECK(cache.n_kv_heads() > 0 && query.visible != nullptr && n_threads > 0);
  if (query.n_heads == 0 || query.n_heads % cache.n_kv_heads() != 0) {
    return unsupported(std::to_string(query.n_heads) +
                       " query heads found; supported are multiples of the " +
                       std::to_string(cache.n_kv_heads()) + " KV heads");
  }
  m.cache = &cache;
  m.query = query;
  m.n_kv_heads = cache.n_kv_heads();
  m.group = query.n_heads / m.n_kv_heads;
  try {
    m.list_segments();
    m.plan_tiles(n_threads);
    m.plan_probes();
  } catch (const std::bad_alloc&) {
    m.n_units = 0;
    return out_of_memory(
        "attention could not get its scratch memory; use a smaller micro-batch (-ub)");
  }
  m.next_unit.store(0, std::memory_order_relaxed);
  return ok_status();
}

void Attention::Impl::list_segments() {
  segments.clear();
  const std::vector<Segment>& all = cache->segments();
  for (std::uint32_t id = 0; id < all.size(); ++id) {
    if (all[id].block != nullptr) {
      segments.push_back(id);
    }
  }
  first_page = static_cast<std::uint32_t>(segments.size());
  for (std::uint32_t id = 0; id < all.size(); ++id) {
    if (all[id].page != nullptr) {
      segments.push_back(id);
    }
  }
  span_begin.assign(1, 0);
  std::uint32_t span_tokens = 0;
  max_tokens = kPageTokens;
  for (std::uint32_t i = 0; i < segments.size(); ++i) {
    const std::uint32_t n = SegmentMath::n_tokens(segment(i));
    max_tokens = std::max(max_tokens, n);
    span_tokens += n;
    if (span_tokens >= kSpanTokens || i + 1 == segments.size()) {
      span_begin.push_back(i + 1);
      span_tokens = 0;
    }
  }
}

void Attention::Impl::plan_tiles(std::uint32_t n_threads) {
  tile_tokens = std::clamp(kTileRows / group, 1u, std::max(query.n_rows, 1u));
  n_tiles = (query.n_rows + tile_tokens - 1) / tile_tokens;
  max_rows = tile_tokens * group;
  logits_stride = round_up(max_tokens, 32) + 32;
  state_floats = SoftmaxState::floats(max_rows, cache->value_dim());

  const std::size_t n_states = std::size_t{n_kv_heads} * n_tiles * n_spans();
  split = n_spans() > 1 && n_states * state_floats * sizeof(float) <= kMaxPartialBytes;
  n_units = n_kv_heads * n_tiles * (split ? n_spans() : 1);
  if (split) {
    partial.resize(n_states * state_floats);
    const std::size_t tickets = std::size_t{n_kv_heads} * n_tiles;
    if (n_tickets < tickets) {
      spans_done = std::make_unique<std::atomic<std::uint32_t>[]>(tickets);
      n_tickets = tickets;
    }
    for (std::size_t i = 0; i < tickets; ++i) {
      spans_done[i].store(0, std::memory_order_relaxed);
    }
  }

  const std::uint32_t max_dim = std::max(cache->key_dim(), cache->value_dim());
  workers.resize(std::max<std::size_t>(workers.size(), n_threads));
  for (Worker& worker : workers) {
    worker.segment.resize(max_rows, max_tokens, max_dim);
    worker.q.resize(std::size_t{max_rows} * cache->key_dim());
    worker.probe_q.resize(worker.q.size());
    worker.lse.resize(max_rows);
    worker.tokens.reserve(tile_tokens);
    worker.logits.resize(max_rows * logits_stride);
    worker.state.resize(state_floats);
    worker.total.resize(state_floats);
    worker.seen.resize(tile_tokens * ((max_tokens + 63) / 64));
    worker.by_slot.resize(worker.seen.size());
    worker.order.resize(max_tokens);
  }
}

void Attention::Impl::plan_probes() {
  sealer.reset();
  probes.clear();
  if (cache->policy().seals() && query.rows_are_newest) {
    ZC_CHECK(cache->newest_cells().size() == query.n_rows);
    sealer = std::make_unique<Sealer>(*cache);
    sealer->begin_step(*query.visible, query.first_row, &probes);
  }
  tile_probe.clear();
  mass_tile.clear();
  std::uint32_t next = 0;
  std::uint32_t tiles_with_probes = 0;
  for (std::uint32_t tile = 0; tile < n_tiles; ++tile) {
    tile_probe.push_back(next);
    while (next < probes.size() && probes[next].row < (tile + 1) * tile_tokens) {
      ++next;
    }
    mass_tile.push_back(tiles_with_probes);
    tiles_with_probes += next > tile_probe.back() ? 1 : 0;
  }
  tile_probe.push_back(next);
  mass.assign(std::size_t{tiles_with_probes} * n_kv_heads * n_pages() * kPageTokens, 0.0f);
}

// ---- run -------------------------------------------------------------------------------------

void Attention::run(std::uint32_t ith) {
  Impl& m = *impl_;
  for (;;) {
    const std::uint32_t unit = m.next_unit.fetch_add(1, std::memory_order_relaxed);
    if (unit >= m.n_units) {
      return;
    }
    m.run_unit(unit, m.workers[ith]);
  }
}

void Attention::Impl::run_unit(std::uint32_t unit, Worker& worker) const {
  const std::uint32_t spans = split ? n_spans() : 1;
  // Late tiles see the most: they start first, so that no thread is left with a long one.
  const std::uint32_t tile = n_tiles - 1 - unit / (spans * n_kv_heads);
  const std::uint32_t head = unit / spans % n_kv_heads;
  const std::size_t n_rows = std::size_t{tile_size(tile)} * group;
  load_queries(head, tile, worker);
  SoftmaxState total = state_at(worker.total.data(), n_rows);

  if (!split) {
    total.clear();
    for (std::uint32_t span = 0; span < n_spans(); ++span) {
      SoftmaxState state = state_at(worker.state.data(), n_rows);
      attend_span(head, tile, span, worker, state);
      total.merge(state);
    }
    finish_tile(head, tile, worker, total);
    return;
  }
  const std::size_t ticket = std::size_t{head} * n_tiles + tile;
  float* states = const_cast<float*>(partial.data()) + ticket * spans * state_floats;
  const std::uint32_t span = unit % spans;
  attend_span(head, tile, span, worker, state_at(states + span * state_floats, n_rows));
  if (spans_done[ticket].fetch_add(1, std::memory_order_acq_rel) + 1 < spans) {
    return;
  }
  total.clear();  // the last one merges, always in the order of spans
  for (std::uint32_t i = 0; i < spans; ++i) {
    total.merge(state_at(states + i * state_floats, n_rows));
  }
  finish_tile(head, tile, worker, total);
}

void Attention::Impl::load_queries(std::uint32_t head, std::uint32_t tile, Worker& worker) const {
  const std::uint32_t dim = cache->key_dim();
  const float scale = query.scale * kLog2E;
  float* q = worker.q.data();
  worker.tokens.clear();
  for (std::uint32_t t = 0; t < tile_size(tile); ++t) {
    worker.tokens.push_back(tile * tile_tokens + t);
    for (std::uint32_t g = 0; g < group; ++g, q += dim) {
      const float* in = query.q + (std::size_t{tile} * tile_tokens + t) * query.q_row_stride +
                        (std::size_t{head} * group + g) * query.q_head_stride;
      for (std::uint32_t c = 0; c < dim; ++c) {
        q[c] = in[c] * scale;
      }
    }
  }
}

// Fills worker.seen: bit = the token of the tile sees the token (slot) of the segment.
Sight Attention::Impl::look(const Segment& segment, std::uint32_t tile, Worker& worker) const {
  const std::uint32_t n = SegmentMath::n_tokens(segment);
  const std::uint32_t words = (n + 63) / 64;
  std::uint64_t some = 0;
  bool all = true;
  for (std::uint32_t t = 0; t < tile_size(tile); ++t) {
    const std::uint32_t row = query.first_row + tile * tile_tokens + t;
    std::uint64_t* seen = worker.seen.data() + std::size_t{t} * words;
    if (segment.block != nullptr && segment.block->cells.empty()) {
      query.visible->extract(row, segment.block->first_cell, n, seen);
    } else {
      std::fill_n(seen, words, 0);
      for (std::uint32_t i = 0; i < n; ++i) {
        const std::uint32_t cell =
            segment.page != nullptr ? segment.page->cells[i] : segment.block->cells[i];
        seen[i / 64] |= std::uint64_t{query.visible->sees(row, cell)} << (i % 64);
      }
    }
    for (std::uint32_t i = 0; segment.block != nullptr && i < segment.block->dead.size(); ++i) {
      seen[i / 64] &= ~(std::uint64_t{segment.block->dead[i]} << (i % 64));
    }
    for (std::uint32_t w = 0; w < words; ++w) {
      const std::uint64_t full = ~std::uint64_t{0} >> (w + 1 < words ? 0 : (64 - n % 64) % 64);
      some |= seen[w];
      all = all && seen[w] == full;
    }
  }
  return some == 0 ? Sight::kNone : all ? Sight::kAll : Sight::kSome;
}

// Base-2 logits of worker.tokens into worker.logits, with the soft cap and the mask's bias, but not
// yet masked. q: [tokens, group, key_dim].
void Attention::Impl::segment_logits(const Segment& segment, std::uint32_t head, const float* q,
                                     Worker& worker) const {
  const std::size_t n_rows = worker.tokens.size() * group;
  SegmentMath(kernels, *cache)
      .logits(segment, head, q, n_rows, worker.logits.data(), logits_stride, worker.segment);
  const std::uint32_t n = SegmentMath::n_tokens(segment);
  if (query.softcap > 0.0f) {
    const float cap = query.softcap * kLog2E;
    for (std::size_t row = 0; row < n_rows; ++row) {
      float* s = worker.logits.data() + row * logits_stride;
      for (std::uint32_t i = 0; i < n; ++i) {
        s[i] = cap * std::tanh(s[i] / cap);
      }
    }
  }
  if (!query.visible->has_bias()) {
    return;
  }
  if (segment.block != nullptr) {
    format::slot_order(*segment.block->layout, segment.block->bytes.data(), head,
                       worker.order.data());
  }
  for (std::size_t row = 0; row < n_rows; ++row) {
    float* s = worker.logits.data() + row * logits_stride;
    const std::uint32_t mask_row = query.first_row + worker.tokens[row / group];
    const std::size_t query_head = std::size_t{head} * group + row % group;
    const float slope = (query.slopes == nullptr ? 1.0f : query.slopes[query_head]) * kLog2E;
    for (std::uint32_t i = 0; i < n; ++i) {
      const std::uint32_t cell =
          segment.page != nullptr ? segment.page->cells[i] : segment.block->cell(worker.order[i]);
      if (query.visible->sees(mask_row, cell)) {
        s[i] += slope * query.visible->bias(mask_row, cell);
      }
    }
  }
}

// Hides what worker.seen says is not visible.
void Attention::Impl::mask_logits(const Segment& segment, std::uint32_t head,
                                  std::uint32_t n_tokens, Worker& worker) const {
  const std::uint32_t n = SegmentMath::n_tokens(segment);
  const std::uint32_t words = (n + 63) / 64;
  const std::uint64_t* by_slot = worker.seen.data();
  if (segment.block != nullptr && segment.block->layout->n_tiers() > 1) {
    format::slot_order(*segment.block->layout, segment.block->bytes.data(), head,
                       worker.order.data());
    std::fill_n(worker.by_slot.begin(), std::size_t{n_tokens} * words, 0);
    for (std::uint32_t t = 0; t < n_tokens; ++t) {
      const std::uint64_t* seen = worker.seen.data() + std::size_t{t} * words;
      std::uint64_t* out = worker.by_slot.data() + std::size_t{t} * words;
      for (std::uint32_t slot = 0; slot < n; ++slot) {
        const std::uint32_t token = worker.order[slot];
        out[slot / 64] |= (seen[token / 64] >> (token % 64) & 1u) << (slot % 64);
      }
    }
    by_slot = worker.by_slot.data();
  }
  for (std::size_t row = 0; row < std::size_t{n_tokens} * group; ++row) {
    kernels.mask(worker.logits.data() + row * logits_stride, n, by_slot + row / group * words);
  }
}

void Attention::Impl::attend_span(std::uint32_t head, std::uint32_t tile, std::uint32_t span,
                                  Worker& worker, SoftmaxState state) const {
  const std::uint32_t n_tokens = tile_size(tile);
  const std::size_t n_rows = std::size_t{n_tokens} * group;
  const SegmentMath math(kernels, *cache);
  state.clear();
  for (std::uint32_t i = span_begin[span]; i < span_begin[span + 1]; ++i) {
    const Segment& seg = segment(i);
    const Sight sight = look(seg, tile, worker);
    if (sight == Sight::kNone) {
      continue;
    }
    segment_logits(seg, head, worker.q.data(), worker);
    if (sight == Sight::kSome) {
      mask_logits(seg, head, n_tokens, worker);
    }
    const std::uint32_t n = SegmentMath::n_tokens(seg);
    for (std::size_t row = 0; row < n_rows; ++row) {
      float* s = worker.logits.data() + row * logits_stride;
      const float max = std::max(state.max(row), kernels.max(s, n));
      state.rescale(row, max);
      state.add_sum(row, kernels.exp2_sum(s, n, max));
    }
    math.accumulate(seg, head, worker.logits.data(), logits_stride, n_rows, state.values(),
                    worker.segment);
  }
}

void Attention::Impl::finish_tile(std::uint32_t head, std::uint32_t tile, Worker& worker,
                                  SoftmaxState total) const {
  const std::uint32_t n_tokens = tile_size(tile);
  for (std::uint32_t t = 0; t < n_tokens; ++t) {
    for (std::uint32_t g = 0; g < group; ++g) {
      const std::size_t row = std::size_t{t} * group + g;
      const std::uint32_t query_head = head * group + g;
      if (query.sinks != nullptr) {
        total.add_logit(row, query.sinks[query_head] * kLog2E);
      }
      worker.lse[row] = total.write(
          row, query.out + (std::size_t{tile} * tile_tokens + t) * query.out_row_stride +
                   query_head * query.out_head_stride);
    }
  }
  if (tile_probe[tile] < tile_probe[tile + 1]) {
    probe_mass(head, tile, worker);
  }
}

// Attention that the tile's probe rows pay to each staged token (paper Eq. 9), summed over the
// query heads of the group. Only staged tokens will be ranked, so only their logits are formed
// again, now that the rows' normaliser is known.
void Attention::Impl::probe_mass(std::uint32_t head, std::uint32_t tile, Worker& worker) const {
  const std::size_t token_floats = std::size_t{group} * cache->key_dim();
  worker.tokens.clear();
  for (std::uint32_t i = tile_probe[tile]; i < tile_probe[tile + 1]; ++i) {
    const std::size_t t = probes[i].row - tile * tile_tokens;
    std::copy_n(worker.q.data() + t * token_floats, token_floats,
                worker.probe_q.data() + worker.tokens.size() * token_floats);
    worker.tokens.push_back(probes[i].row);
  }
  float* out = mass_of(tile, head);
  for (std::uint32_t page = 0; page < n_pages(); ++page, out += kPageTokens) {
    const Segment& seg = segment(first_page + page);
    if (look(seg, tile, worker) == Sight::kNone) {
      continue;
    }
    segment_logits(seg, head, worker.probe_q.data(), worker);
    for (std::size_t row = 0; row < worker.tokens.size() * group; ++row) {
      const std::size_t t = worker.tokens[row / group] - tile * tile_tokens;
      const float lse = worker.lse[t * group + row % group];
      if (!(lse > -kInfinity)) {
        continue;  // sees nothing, or NaN: no saliency from it
      }
      float* s = worker.logits.data() + row * logits_stride;
      kernels.mask(s, kPageTokens, worker.seen.data() + t);
      kernels.exp2_sum(s, kPageTokens, lse);
      kernels.axpby(out, kPageTokens, 1.0f, s, probes[tile_probe[tile] + row / group].weight);
    }
  }
}

// ---- commit ----------------------------------------------------------------------------------

Status Attention::commit() {
  Impl& m = *impl_;
  if (m.sealer == nullptr) {
    return ok_status();
  }
  std::vector<float> total(m.n_kv_heads);
  const std::size_t n_staged = std::size_t{m.n_pages()} * kPageTokens;
  const std::size_t n_mass_tiles = n_staged == 0 ? 0 : m.mass.size() / (m.n_kv_heads * n_staged);
  for (std::uint32_t page = 0; page < m.n_pages(); ++page) {
    const std::uint32_t id = m.segments[m.first_page + page];
    for (std::uint32_t slot = 0; slot < kPageTokens; ++slot) {
      const std::uint32_t cell = m.cache->page(id)->cells[slot];
      if (cell == kNoCell) {
        continue;
      }
      float seen = 0.0f;
      for (const Probe& probe : m.probes) {
        seen += m.query.visible->sees(m.query.first_row + probe.row, cell) ? probe.weight : 0.0f;
      }
      for (std::uint32_t head = 0; head < m.n_kv_heads; ++head) {
        total[head] = 0.0f;
        for (std::size_t tile = 0; tile < n_mass_tiles; ++tile) {  // a fixed order of summation
          total[head] += m.mass[(tile * m.n_kv_heads + head) * n_staged +
                                std::size_t{page} * kPageTokens + slot];
        }
      }
      m.sealer->add_mass({id, slot}, total.data(), static_cast<std::uint32_t>(seen));
    }
  }
  const Status sealed = m.sealer->end_step();
  m.sealer.reset();
  return sealed;
}

std::size_t Attention::scratch_bytes() const {
  const Impl& m = *impl_;
  std::size_t bytes = m.partial.capacity() * sizeof(float) + m.mass.capacity() * sizeof(float);
  for (const Impl::Worker& worker : m.workers) {
    bytes += worker.segment.bytes() +
             (worker.q.capacity() + worker.logits.capacity() + worker.state.capacity() +
              worker.total.capacity()) *
                 sizeof(float) +
             (worker.seen.capacity() + worker.by_slot.capacity()) * sizeof(std::uint64_t) +
             worker.order.capacity() * sizeof(std::uint32_t);
  }
  return bytes;
}

}  // namespace zipcache::cache
