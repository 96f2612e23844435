// The work of one tile: query rows of a KV head against all segments, span by span.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cache/attention_impl.h"

namespace zipcache::cache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

// First cell of a segment whose cells follow each other, which lets the mask be read by words; else
// kNoCell.
std::uint32_t contiguous_from(const Segment& segment) {
  if (segment.block != nullptr) {
    return segment.block->cells.empty() ? segment.block->first_cell : kNoCell;
  }
  const std::vector<std::uint32_t>& cells = segment.page->cells;
  for (std::uint32_t i = 0; i < cells.size(); ++i) {
    if (cells[i] != cells[0] + i) {
      return kNoCell;
    }
  }
  return cells[0];
}

}  // namespace

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
      attend_span(head, span, worker, state);
      total.merge(state);
    }
    finish_tile(head, tile, worker, total);
    return;
  }
  const std::size_t ticket = std::size_t{head} * n_tiles + tile;
  float* states = const_cast<float*>(partial.data()) + ticket * spans * state_floats;
  const std::uint32_t span = unit % spans;
  attend_span(head, span, worker, state_at(states + span * state_floats, n_rows));
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

// Fills worker.seen, a row per worker.tokens: bit = that token sees the token (slot) of the
// segment.
Sight Attention::Impl::look(const Segment& segment, Worker& worker) const {
  const std::uint32_t n = SegmentMath::n_tokens(segment);
  const std::uint32_t words = (n + 63) / 64;
  const std::uint32_t first_cell = contiguous_from(segment);
  std::uint64_t some = 0;
  bool all = true;
  for (std::size_t t = 0; t < worker.tokens.size(); ++t) {
    const std::uint32_t row = query.first_row + worker.tokens[t];
    std::uint64_t* seen = worker.seen.data() + t * words;
    if (first_cell != kNoCell) {
      query.visible->extract(row, first_cell, n, seen);
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

// worker.seen in slot order of the head.
const std::uint64_t* Attention::Impl::sight_by_slot(const Segment& segment, std::uint32_t head,
                                                    Worker& worker) const {
  if (segment.block == nullptr || segment.block->layout->n_tiers() == 1) {
    return worker.seen.data();
  }
  const std::uint32_t n = SegmentMath::n_tokens(segment);
  const std::uint32_t words = (n + 63) / 64;
  format::slot_order(*segment.block->layout, segment.block->bytes.data(), head,
                     worker.order.data());
  std::fill_n(worker.by_slot.begin(), worker.tokens.size() * words, 0);
  for (std::size_t t = 0; t < worker.tokens.size(); ++t) {
    const std::uint64_t* seen = worker.seen.data() + t * words;
    std::uint64_t* out = worker.by_slot.data() + t * words;
    for (std::uint32_t slot = 0; slot < n; ++slot) {
      const std::uint32_t token = worker.order[slot];
      out[slot / 64] |= (seen[token / 64] >> (token % 64) & 1u) << (slot % 64);
    }
  }
  return worker.by_slot.data();
}

// Hides what worker.seen says is not visible.
void Attention::Impl::mask_logits(const Segment& segment, std::uint32_t head,
                                  Worker& worker) const {
  const std::uint32_t n = SegmentMath::n_tokens(segment);
  const std::uint32_t words = (n + 63) / 64;
  const std::uint64_t* by_slot = sight_by_slot(segment, head, worker);
  for (std::size_t row = 0; row < worker.tokens.size() * group; ++row) {
    kernels.mask(worker.logits.data() + row * logits_stride, n, by_slot + row / group * words);
  }
}

void Attention::Impl::attend_span(std::uint32_t head, std::uint32_t span, Worker& worker,
                                  SoftmaxState state) const {
  const std::size_t n_rows = worker.tokens.size() * group;
  const SegmentMath math(kernels, *cache);
  state.clear();
  for (std::uint32_t i = span_begin[span]; i < span_begin[span + 1]; ++i) {
    const Segment& seg = segment(i);
    const Sight sight = look(seg, worker);
    if (sight == Sight::kNone) {
      continue;
    }
    segment_logits(seg, head, worker.q.data(), worker);
    if (sight == Sight::kSome) {
      mask_logits(seg, head, worker);
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
// query heads of the group. Only tokens that will be ranked (staged ones, and sealed ones that may
// be evicted later) have their logits formed again, now that the rows' normaliser is known.
void Attention::Impl::probe_mass(std::uint32_t head, std::uint32_t tile, Worker& worker) const {
  const std::size_t token_floats = std::size_t{group} * cache->key_dim();
  worker.tokens.clear();
  for (std::uint32_t i = tile_probe[tile]; i < tile_probe[tile + 1]; ++i) {
    const std::size_t t = probes[i].row - tile * tile_tokens;
    std::copy_n(worker.q.data() + t * token_floats, token_floats,
                worker.probe_q.data() + worker.tokens.size() * token_floats);
    worker.tokens.push_back(probes[i].row);
  }
  for (std::size_t i = 0; i < ranked.size(); ++i) {
    const Segment& seg = cache->segments()[ranked[i]];
    if (look(seg, worker) == Sight::kNone) {
      continue;
    }
    const std::uint32_t words = (SegmentMath::n_tokens(seg) + 63) / 64;
    const std::uint64_t* sight = sight_by_slot(seg, head, worker);
    const std::size_t n = ranked_begin[i + 1] - ranked_begin[i];
    const std::size_t at = mass_begin(tile, head) + ranked_begin[i];
    float* out = const_cast<float*>(mass.data()) + at;
    segment_logits(seg, head, worker.probe_q.data(), worker);
    for (std::size_t row = 0; row < worker.tokens.size() * group; ++row) {
      const std::size_t probe = row / group;
      const std::size_t t = worker.tokens[probe] - tile * tile_tokens;
      const float lse = worker.lse[t * group + row % group];
      const float weight = probes[tile_probe[tile] + probe].weight;
      float* s = worker.logits.data() + row * logits_stride;
      if (lse > -kInfinity) {  // else it sees nothing, or NaN: no saliency from it
        kernels.mask(s, n, sight + probe * words);
        kernels.exp2_sum(s, n, lse);
        kernels.axpby(out, n, 1.0f, s, weight);
      } else {
        std::fill_n(s, n, 0.0f);
      }
      if (!squares.empty()) {
        float* sum = worker.row_mass.data();
        if (row % group == 0) {
          std::fill_n(sum, n, 0.0f);
        }
        kernels.axpby(sum, n, 1.0f, s, 1.0f);
        if (row % group + 1 == group) {
          kernels.multiply(sum, sum, sum, n);
          kernels.axpby(const_cast<float*>(squares.data()) + at, n, 1.0f, sum, weight);
        }
      }
    }
  }
}

}  // namespace zipcache::cache
