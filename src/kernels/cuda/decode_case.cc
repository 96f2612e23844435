#include "kernels/cuda/decode_case.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cuda/attention_check.h"
#include "kernels/cuda/host_page.h"

namespace zipcache::cuda {
namespace {

Half half(float x) { return float_to_half(x); }

// Pages with random codes of `n_tokens` tokens of a class; unused slots and gaps keep their poison.
void add_pages(const DecodeCase& c, int cls, int n_tokens, int set, Random& random,
               HostCache& cache) {
  const PageClass bits = c.classes[cls];
  for (int first = 0; first < n_tokens; first += kPageTokens) {
    PageEntry entry;
    entry.tokens = static_cast<std::uint8_t>(std::min(n_tokens - first, kPageTokens));
    entry.cls = static_cast<std::uint8_t>(cls);
    entry.set = static_cast<std::uint16_t>(set);
    cache.pool.resize(cache.pool.size() + kTileAlignment * random.below(3), std::byte{0xff});
    entry.unit = static_cast<std::uint32_t>(cache.pool.size() / kTileAlignment);
    const std::size_t bytes = page_bytes(c.head_dim, bits);
    cache.pool.resize(cache.pool.size() + bytes, std::byte{0x5a});
    HostPage page({&cache.pool[std::size_t{entry.unit} * kTileAlignment], bytes}, c.head_dim, bits);
    for (int token = 0; token < kPageTokens; ++token) {
      if (token >= entry.tokens) {
        page.set_scale_zero(token, 0, 0);
        continue;
      }
      for (int channel = 0; channel < c.head_dim; ++channel) {
        const int key_bits = bits.chunk_bits(channel / kChunkChannels);
        page.set_key_code(token, channel, static_cast<int>(random.below(1u << key_bits)));
        page.set_value_code(token, channel, static_cast<int>(random.below(1u << bits.value_bits)));
      }
      const float levels = static_cast<float>((1 << bits.value_bits) - 1);
      page.set_scale_zero(token, half(random.uniform(0.3f, 1.0f) * 20.0f / levels),
                          half(random.uniform(0.1f, 0.9f) * levels));
    }
    cache.pages.push_back(entry);
  }
}

// Channels of very different ranges, as keys have. In stored order, which is any where there are
// wide channels.
void add_set(const DecodeCase& c, PageClass cls, Random& random, HostCache& cache) {
  std::vector<float> range(c.head_dim), low(c.head_dim);
  for (int channel = 0; channel < c.head_dim; ++channel) {
    range[channel] = 3.0f * std::exp(0.5f * random.normal());
    low[channel] = -range[channel] * random.uniform(0.3f, 0.7f);
    if (random.below(32) == 0) {
      range[channel] *= 4.0f;
      low[channel] += 8.0f;
    }
  }
  for (int channel = 0; channel < c.head_dim; ++channel) {
    const int levels = (1 << cls.chunk_bits(channel / kChunkChannels)) - 1;
    cache.key_sets.push_back(half(range[channel] / static_cast<float>(levels)));
  }
  for (int channel = 0; channel < c.head_dim; ++channel) {
    cache.key_sets.push_back(half(low[channel]));
  }
  const std::size_t first = cache.key_orders.size();
  cache.key_orders.resize(first + c.head_dim, 0xff);  // not to be read
  if (cls.wide_chunks > 0) {
    std::iota(cache.key_orders.begin() + static_cast<std::ptrdiff_t>(first), cache.key_orders.end(),
              std::uint8_t{0});
    for (int at = c.head_dim - 1; at > 0; --at) {
      std::swap(cache.key_orders[first + at], cache.key_orders[first + random.below(at + 1)]);
    }
  }
}

}  // namespace

HostCache make_cache(const DecodeCase& c) {
  Random random(c.seed);
  HostCache cache;
  for (int n = 0; n < c.n_sequences() * c.n_heads() * c.head_dim; ++n) {
    cache.q.push_back(half(random.normal()));
  }
  for (int sequence = 0; sequence < c.n_sequences(); ++sequence) {
    for (int head = 0; head < c.n_kv_heads; ++head) {
      const int base = static_cast<int>(cache.key_sets.size() / (2 * c.head_dim));
      cache.set_base.push_back(base);
      int set = 0;
      for (int segment = 0; segment < c.n_segments; ++segment) {
        for (int cls = 0; cls < static_cast<int>(c.classes.size()); ++cls) {
          const int total = c.class_tokens[sequence][cls];
          const int begin = total * segment / c.n_segments;
          add_pages(c, cls, total * (segment + 1) / c.n_segments - begin, set++, random, cache);
          add_set(c, c.classes[cls], random, cache);
        }
      }
      cache.row_begin.push_back(static_cast<std::int32_t>(cache.pages.size()));
      for (int channel = 0; channel < c.head_dim; ++channel) {
        cache.value_factors.push_back(random.uniform(0.05f, 0.3f));
      }
    }
  }
  if (!c.tail.empty()) {
    cache.tail_tokens.assign(c.tail.begin(), c.tail.end());
    const std::size_t row_halves = std::size_t{kTailTokens} * c.head_dim;
    cache.tail_k.assign(c.n_rows() * row_halves, 0x7fff);  // NaN where no token is
    cache.tail_v.assign(c.n_rows() * row_halves, 0x7fff);
    for (int row = 0; row < c.n_rows(); ++row) {
      for (int n = 0; n < c.tail[row / c.n_kv_heads] * c.head_dim; ++n) {
        cache.tail_k[row * row_halves + n] = half(random.normal());
        cache.tail_v[row * row_halves + n] = half(random.normal());
      }
    }
  }
  return cache;
}

std::vector<DecodedRow> decode_rows(const DecodeCase& c, const HostCache& cache) {
  std::vector<DecodedRow> rows(c.n_rows());
  for (int row = 0; row < c.n_rows(); ++row) {
    for (int at = cache.row_begin[row]; at < cache.row_begin[row + 1]; ++at) {
      const PageEntry entry = cache.pages[at];
      const PageClass cls = c.classes[entry.cls];
      std::byte* bytes =
          const_cast<std::byte*>(&cache.pool[std::size_t{entry.unit} * kTileAlignment]);
      const HostPage page({bytes, static_cast<std::size_t>(page_bytes(c.head_dim, cls))},
                          c.head_dim, cls);
      const std::size_t set_index = std::size_t(cache.set_base[row] + entry.set) * c.head_dim;
      const Half* set = &cache.key_sets[2 * set_index];
      std::vector<int> stored(c.head_dim);  // of every channel
      for (int at = 0; at < c.head_dim; ++at) {
        stored[cls.wide_chunks > 0 ? cache.key_orders[set_index + at] : at] = at;
      }
      const float* factors = &cache.value_factors[std::size_t(row) * c.head_dim];
      for (int token = 0; token < entry.tokens; ++token) {
        const double scale = half_to_float(page.scale(token));
        const double zero = half_to_float(page.zero(token));
        for (int channel = 0; channel < c.head_dim; ++channel) {
          const int at = stored[channel];
          const double k = double{half_to_float(set[at])} * page.key_code(token, at) +
                           half_to_float(set[c.head_dim + at]);
          const double v = factors[channel] * scale * (page.value_code(token, channel) - zero);
          rows[row].k.push_back(static_cast<float>(k));
          rows[row].v.push_back(static_cast<float>(v));
        }
      }
    }
    if (!c.tail.empty()) {
      const std::size_t from = std::size_t(row) * kTailTokens * c.head_dim;
      for (int n = 0; n < c.tail[row / c.n_kv_heads] * c.head_dim; ++n) {
        rows[row].k.push_back(half_to_float(cache.tail_k[from + n]));
        rows[row].v.push_back(half_to_float(cache.tail_v[from + n]));
      }
    }
  }
  return rows;
}

namespace {

std::vector<float> to_floats(const std::vector<Half>& halves) {
  std::vector<float> floats(halves.size());
  std::ranges::transform(halves, floats.begin(), half_to_float);
  return floats;
}

// What a launch stores: the last token of every tail, taken out of the tails, and a ring of probes.
class StoredTokens {
 public:
  static constexpr int kRing = 3, kPadding = 4;  // floats between the rows of two sequences

  StoredTokens(const DecodeCase& c, const HostCache& cache)
      : case_(c), cache_(cache), tail_k_(cache.tail_k), tail_v_(cache.tail_v) {
    if (!c.stores) {
      return;
    }
    std::vector<float> k, v;
    for (int row = 0; row < c.n_rows(); ++row) {
      const auto at = static_cast<std::ptrdiff_t>(
          (std::size_t(row) * kTailTokens + c.tail[row / c.n_kv_heads] - 1) * c.head_dim);
      for (auto [from, to] : {std::pair{&tail_k_, &k}, {&tail_v_, &v}}) {
        const auto first = from->begin() + at;
        std::transform(first, first + c.head_dim, std::back_inserter(*to), half_to_float);
        std::fill_n(first, c.head_dim, Half{0x7fff});
        if (row % c.n_kv_heads == c.n_kv_heads - 1) {
          to->insert(to->end(), kPadding, NAN);
        }
      }
    }
    for (int sequence = 0; sequence < c.n_sequences(); ++sequence) {
      const bool keeps = sequence % 2 == 0;
      ring_at_host_.insert(ring_at_host_.end(), {keeps ? 2 : -1, keeps ? 1 : -1});
      for (int head = 0; head < c.n_heads(); ++head) {
        last_lse_.push_back(static_cast<float>(sequence * 100 + head));
      }
    }
    k_ = DeviceArray<float>(k);
    v_ = DeviceArray<float>(v);
    ring_at_ = DeviceArray<std::int32_t>(ring_at_host_);
    const std::size_t n_probes = std::size_t(c.n_sequences()) * kRing * c.n_heads();
    ring_q_ = DeviceArray<Half>(n_probes * c.head_dim, 0);
    ring_lse_ = DeviceArray<float>(n_probes, 0);
  }

  // Before a launch: what it will store is not there.
  void prepare(DeviceArray<Half>& tail_k, DeviceArray<Half>& tail_v,
               DeviceArray<float>& lse) const {
    tail_k = DeviceArray<Half>(tail_k_);
    tail_v = DeviceArray<Half>(tail_v_);
    if (case_.stores) {
      require(cudaMemcpy(lse.data(), last_lse_.data(), last_lse_.size() * sizeof(float),
                         cudaMemcpyHostToDevice));
    }
  }
  DecodeStore params() const {
    DecodeStore store;
    if (case_.stores) {
      store.k = k_.data();
      store.v = v_.data();
      store.k_stride = store.v_stride = case_.n_kv_heads * case_.head_dim + kPadding;
      store.ring_q = ring_q_.data();
      store.ring_lse = ring_lse_.data();
      store.ring_at = ring_at_.data();
      store.ring = kRing;
    }
    return store;
  }
  void expect_stored(const DeviceArray<Half>& tail_k, const DeviceArray<Half>& tail_v) const {
    EXPECT_TRUE(tail_k.guards_intact() && tail_v.guards_intact());
    EXPECT_EQ(tail_k.to_host(), cache_.tail_k);
    EXPECT_EQ(tail_v.to_host(), cache_.tail_v);
    if (!case_.stores) {
      return;
    }
    std::vector<Half> want_q(ring_q_.size(), 0);
    std::vector<float> want_lse(ring_lse_.size(), 0);
    const std::size_t heads = case_.n_heads(), query = heads * case_.head_dim;
    for (std::size_t sequence = 0; sequence < std::size_t(case_.n_sequences()); sequence += 2) {
      std::copy_n(&cache_.q[sequence * query], query, &want_q[(sequence * kRing + 2) * query]);
      std::copy_n(&last_lse_[sequence * heads], heads, &want_lse[(sequence * kRing + 1) * heads]);
    }
    EXPECT_EQ(ring_q_.to_host(), want_q);
    EXPECT_EQ(ring_lse_.to_host(), want_lse);
    EXPECT_TRUE(ring_q_.guards_intact() && ring_lse_.guards_intact());
  }

 private:
  const DecodeCase& case_;
  const HostCache& cache_;
  std::vector<Half> tail_k_, tail_v_;
  std::vector<std::int32_t> ring_at_host_;
  std::vector<float> last_lse_;
  DeviceArray<float> k_, v_, ring_lse_;
  DeviceArray<Half> ring_q_;
  DeviceArray<std::int32_t> ring_at_;
};

}  // namespace

std::vector<Outputs> run_decode(const DecodeCase& c, const HostCache& cache, int repeats) {
  const auto setup = prepare_decode(c.head_dim, c.group, c.classes);
  if (!setup) {
    throw std::runtime_error(setup.error().message);
  }
  PlanInput input;
  input.head_dim = c.head_dim;
  input.classes = c.classes;
  input.pages = cache.pages;
  input.row_begin = cache.row_begin;
  input.set_base = cache.set_base;
  input.group = c.group;
  input.n_kv_heads = c.n_kv_heads;
  input.with_tail = !c.tail.empty();
  input.resident_blocks = c.resident_blocks > 0 ? c.resident_blocks : setup->resident_blocks;
  input.resident_clusters = std::min(setup->resident_clusters,
                                     (input.resident_blocks + kClusterBlocks - 1) / kClusterBlocks);
  input.min_block_bytes = 2 << 10;  // many splits, also of small cases
  input.part_bytes = input.tail_bytes = 1 << 10;
  input.tail_tokens = 1;
  input.n_blocks = static_cast<int>(c.seed % 3) * 4;  // sometimes more than have work
  const DecodePlan plan = plan_decode(input);

  const DeviceArray<float> q(to_floats(cache.q));
  const DeviceArray<Half> key_sets(cache.key_sets);
  // cudaMalloc aligns to 256 bytes and the guard keeps that.
  const DeviceArray<std::byte> pool(cache.pool);
  const DeviceArray<PageEntry> pages(cache.pages);
  const DeviceArray<std::uint8_t> key_orders(cache.key_orders);
  const DeviceArray<std::int32_t> tail_tokens(cache.tail_tokens);
  const DeviceArray<float> value_factors(cache.value_factors);
  const DeviceArray<WorkItem> items(plan.items);
  DeviceArray<float> partials(std::size_t(plan.n_partials) * partial_floats(c.head_dim, c.group));
  DeviceArray<std::uint32_t> tickets(c.n_rows(), 0);
  DeviceArray<float> out(cache.q.size()), lse(std::size_t(c.n_sequences()) * c.n_heads());

  DecodeParams params;
  params.n_sequences = c.n_sequences();
  params.n_kv_heads = c.n_kv_heads;
  params.n_heads = c.n_heads();
  params.head_dim = c.head_dim;
  params.scale = c.scale();
  params.q = q.data();
  params.out = out.data();
  params.lse = lse.data();
  params.pool = reinterpret_cast<const std::uint8_t*>(pool.data());
  params.pages = pages.data();
  params.key_sets = key_sets.data();
  params.key_orders = key_orders.data();
  params.value_factors = value_factors.data();
  params.items = items.data();
  params.n_blocks = plan.n_blocks;
  params.cluster_blocks = plan.cluster_blocks;
  params.partials = partials.data();
  params.tickets = tickets.data();

  const StoredTokens stored(c, cache);
  DeviceArray<Half> tail_k, tail_v;
  std::vector<Outputs> results;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    out.fill(0xff);
    lse.fill(0xff);
    partials.fill(0xff);
    if (!c.tail.empty()) {
      stored.prepare(tail_k, tail_v, lse);
      params.tail_k = tail_k.data();
      params.tail_v = tail_v.data();
      params.tail_tokens = tail_tokens.data();
      params.store = stored.params();
    }
    const Status status = decode(params, *setup, nullptr);
    if (!status) {
      throw std::runtime_error(status.error().message);
    }
    results.push_back({out.to_host(), lse.to_host(), plan.cluster_blocks});
    if (!c.tail.empty()) {
      stored.expect_stored(tail_k, tail_v);
    }
  }
  EXPECT_TRUE(out.guards_intact() && lse.guards_intact() && partials.guards_intact());
  EXPECT_EQ(tickets.to_host(), std::vector<std::uint32_t>(c.n_rows(), 0));
  return results;
}

void expect_attention(const DecodeCase& c, const HostCache& cache, const Outputs& got) {
  const std::vector<DecodedRow> rows = decode_rows(c, cache);
  AttentionCheck check;
  for (int row = 0; row < c.n_rows(); ++row) {
    const std::size_t first_head =
        std::size_t(row / c.n_kv_heads) * c.n_heads() + std::size_t(row % c.n_kv_heads) * c.group;
    const std::size_t n = std::size_t(c.group) * c.head_dim;
    std::vector<float> q(n);
    std::transform(&cache.q[first_head * c.head_dim], &cache.q[first_head * c.head_dim] + n,
                   q.begin(), half_to_float);
    ref::AttentionCase a;
    a.n_rows = 1;
    a.n_heads = c.group;
    a.n_tokens = rows[row].k.size() / c.head_dim;
    a.n_kv_heads = 1;
    a.key_dim = a.value_dim = c.head_dim;
    a.q = q;
    a.k = rows[row].k;
    a.v = rows[row].v;
    a.scale = c.scale();
    check.add(a, {&got.out[first_head * c.head_dim], n},
              {&got.lse[first_head], std::size_t(c.group)});
  }
  check.expect_close();
}

}  // namespace zipcache::cuda
