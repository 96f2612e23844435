// Planning an attention step, handing out its units, and the policy's work after it.
#include "cache/attention.h"

#include <algorithm>
#include <chrono>
#include <new>

#include "base/check.h"
#include "cache/attention_impl.h"

namespace zipcache::cache {
namespace {

// Query rows (tokens x heads of a group) that share one pass over a segment: enough to amortise
// unpacking, few enough that logits of a block stay in the second-level cache.
constexpr std::uint32_t kTileRows = 64;
// Segments are summed in spans of at least this many tokens, each from an empty state, then the
// spans are merged in order: the result does not depend on whether threads share a tile's spans.
constexpr std::uint32_t kSpanTokens = 1024;
// A long cache has longer spans instead of more: partial states don't grow with it.
constexpr std::uint32_t kMaxSpans = 32;
// Spans of a tile go to different threads as long as their partial states fit here.
constexpr std::size_t kMaxPartialBytes = std::size_t{4} << 20;

}  // namespace

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
  m.n_running.store(n_threads, std::memory_order_relaxed);
  m.team.start();
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
  std::uint32_t n_tokens = 0;
  for (std::uint32_t i = 0; i < segments.size(); ++i) {
    n_tokens += SegmentMath::n_tokens(segment(i));
  }
  const std::uint32_t min_span_tokens = std::max(kSpanTokens, n_tokens / kMaxSpans);
  span_begin.assign(1, 0);
  std::uint32_t span_tokens = 0;
  max_tokens = kPageTokens;
  for (std::uint32_t i = 0; i < segments.size(); ++i) {
    const std::uint32_t n = SegmentMath::n_tokens(segment(i));
    max_tokens = std::max(max_tokens, n);
    span_tokens += n;
    if (span_tokens >= min_span_tokens || i + 1 == segments.size()) {
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
    worker.row_mass.resize(max_tokens);
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
    sealer.emplace(*cache, sealer_scratch);
    sealer->begin_step(*query.visible, query.first_row, &probes);
    sealer->observe_queries(query.q, query.q_row_stride, query.q_head_stride, group);
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
  ranked.assign(segments.begin() + first_page, segments.end());
  for (std::uint32_t i = 0; i < first_page; ++i) {
    if (segment(i).block->mass_slots() > 0) {
      ranked.push_back(segments[i]);
    }
  }
  ranked_begin.assign(1, 0);
  for (const std::uint32_t id : ranked) {
    const Segment& seg = cache->segments()[id];
    ranked_begin.push_back(ranked_begin.back() +
                           (seg.page != nullptr ? seg.page->capacity() : seg.block->mass_slots()));
  }
  mass.assign(std::size_t{tiles_with_probes} * n_kv_heads * ranked_begin.back(), 0.0f);
  squares.assign(sealer && sealer->needs_squares() ? mass.size() : 0, 0.0f);
}

std::size_t Attention::scratch_bytes() const {
  const Impl& m = *impl_;
  const auto bytes = [](const auto& vector) {
    return vector.capacity() * sizeof(typename std::decay_t<decltype(vector)>::value_type);
  };
  std::size_t sum = bytes(m.segments) + bytes(m.span_begin) + bytes(m.partial) + bytes(m.probes) +
                    bytes(m.tile_probe) + bytes(m.mass_tile) + bytes(m.ranked) +
                    bytes(m.ranked_begin) + bytes(m.mass) + bytes(m.squares);
  for (const Impl::Worker& w : m.workers) {
    const SegmentScratch& s = w.segment;
    sum += bytes(w.q) + bytes(w.probe_q) + bytes(w.lse) + bytes(w.row_mass) + bytes(w.tokens) +
           bytes(w.logits) + bytes(w.state) + bytes(w.total) + bytes(w.seen) + bytes(w.by_slot) +
           bytes(w.order) + bytes(s.operand) + bytes(s.product) + bytes(s.token_scale) +
           bytes(s.token_min) + bytes(s.channel_a) + bytes(s.channel_b) + bytes(s.reordered) +
           bytes(s.order) + bytes(s.page) + bytes(s.kernel);
  }
  return sum;
}

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

Status Attention::commit() { return impl_->commit(nullptr); }

Status Attention::run_together(std::uint32_t ith) {
  Impl& m = *impl_;
  run(ith);
  if (m.n_running.fetch_sub(1, std::memory_order_acq_rel) > 1) {
    m.team.help();
    return ok_status();
  }
  const TeamRound round(&m.team);
  return m.commit(&m.team);
}

Status Attention::Impl::commit(TaskTeam* helpers) {
  if (!sealer) {
    return ok_status();
  }
  const auto start = std::chrono::steady_clock::now();
  add_probe_mass();
  Status sealed = sealer->end_step(helpers);
  sealer.reset();
  cache->add_policy_time(std::chrono::steady_clock::now() - start);
  return sealed;
}

// What all probes of the step paid to each ranked token goes to the token.
void Attention::Impl::add_probe_mass() {
  total_mass.resize(n_kv_heads);
  total_squares.resize(squares.empty() ? 0 : n_kv_heads);
  const std::size_t n_ranked = ranked_begin.back();
  const std::size_t n_mass_tiles = n_ranked == 0 ? 0 : mass.size() / (n_kv_heads * n_ranked);
  const auto sum = [&](const std::vector<float>& parts, std::uint32_t head, std::size_t token) {
    float all = 0.0f;
    for (std::size_t tile = 0; tile < n_mass_tiles; ++tile) {  // a fixed order of summation
      all += parts[(tile * n_kv_heads + head) * n_ranked + token];
    }
    return all;
  };
  for (std::size_t i = 0; i < ranked.size(); ++i) {
    const std::uint32_t id = ranked[i];
    if (SealedBlock* block = cache->block(id)) {
      for (std::size_t slot = 0; slot < block->mass.size(); ++slot) {
        const std::uint32_t n = block->mass_slots();
        block->mass[slot] +=
            sum(mass, static_cast<std::uint32_t>(slot / n), ranked_begin[i] + slot % n);
      }
      continue;
    }
    for (std::uint32_t slot = 0; slot < cache->page(id)->capacity(); ++slot) {
      const std::uint32_t cell = cache->page(id)->cells[slot];
      if (cell == kNoCell) {
        continue;
      }
      float seen = 0.0f;
      for (const Probe& probe : probes) {
        seen += query.visible->sees(query.first_row + probe.row, cell) ? probe.weight : 0.0f;
      }
      for (std::uint32_t head = 0; head < n_kv_heads; ++head) {
        total_mass[head] = sum(mass, head, ranked_begin[i] + slot);
        if (!squares.empty()) {
          total_squares[head] = sum(squares, head, ranked_begin[i] + slot);
        }
      }
      sealer->add_mass({id, slot}, total_mass.data(),
                       squares.empty() ? nullptr : total_squares.data(),
                       static_cast<std::uint32_t>(seen));
    }
  }
}

}  // namespace zipcache::cache
