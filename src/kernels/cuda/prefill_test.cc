// Prefill attention against the formula in double, over widths, head dims, groups, lengths, masks
// and cuts of the keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "kernels/cuda/attention_check.h"
#include "kernels/cuda/decode_case.h"
#include "kernels/cuda/prefill_config.h"

namespace zipcache::cuda {
namespace {

using PrefillTest = DeviceTest;

constexpr Half kHidden = 0xfc00;  // -inf

struct PrefillCase {
  DecodeCase cache;  // its pages; one sequence
  int n_queries = 5;
  int n_dense = 0;
  bool dense_as_tail = false;  // [head, token, channel] instead of [token, head, channel]
  int dead_every = 0;          // every n-th token is dead
  int n_splits = 1;
  float softcap = 0;
  bool sinks = false, slopes = false;
  // What query n adds to the logits of a cell, as fp16; nullptr: no mask.
  std::function<Half(int query, int cell)> mask;
};

struct PrefillData {
  HostCache cache;
  std::vector<float> q;  // [n_queries, n_heads, head_dim]
  std::vector<Half> dense_k, dense_v, mask;
  std::vector<std::int32_t> page_cells, dense_cells;
  std::vector<float> slopes, sinks;
  int n_cells = 0;
};

std::size_t dense_index(const PrefillCase& c, int token, int head) {
  const DecodeCase& d = c.cache;
  return (c.dense_as_tail ? std::size_t(head) * c.n_dense + token
                          : std::size_t(token) * d.n_kv_heads + head) *
         d.head_dim;
}

PrefillData make_data(const PrefillCase& c) {
  const DecodeCase& d = c.cache;
  Random random(d.seed + 1000);
  PrefillData data;
  data.cache = make_cache(d);
  for (int n = 0; n < c.n_queries * d.n_heads() * d.head_dim; ++n) {
    data.q.push_back(random.normal());
  }
  // Cells of sealed tokens in another order for every head; dense tokens follow.
  const std::vector<int>& counts = d.class_tokens[0];
  const int n_sealed = std::accumulate(counts.begin(), counts.end(), 0);
  data.n_cells = n_sealed + c.n_dense;
  for (int head = 0; head < d.n_kv_heads; ++head) {
    std::vector<std::int32_t> cells(n_sealed);
    std::iota(cells.begin(), cells.end(), 0);
    for (int at = n_sealed - 1; at > 0; --at) {
      std::swap(cells[at], cells[random.below(at + 1)]);
    }
    int next = 0;
    for (int page = data.cache.row_begin[head]; page < data.cache.row_begin[head + 1]; ++page) {
      for (int slot = 0; slot < kPageTokens; ++slot) {
        const bool there = slot < data.cache.pages[page].tokens;
        std::int32_t cell = there ? cells[next++] : 12345678;
        if (there && c.dead_every > 0 && next % c.dead_every == 0) {
          cell = -1;
        }
        data.page_cells.push_back(cell);
      }
    }
  }
  for (int token = 0; token < c.n_dense; ++token) {
    const bool dead = c.dead_every > 0 && token % c.dead_every == 1;
    data.dense_cells.push_back(dead ? -1 : n_sealed + (token ^ 1) % c.n_dense);
  }
  data.dense_k.resize(std::size_t(c.n_dense) * d.n_kv_heads * d.head_dim);
  for (Half& x : data.dense_k) {
    x = float_to_half(random.normal());
  }
  data.dense_v = data.dense_k;
  std::ranges::reverse(data.dense_v);
  if (c.mask) {
    for (int query = 0; query < c.n_queries; ++query) {
      for (int cell = 0; cell < data.n_cells; ++cell) {
        data.mask.push_back(c.mask(query, cell));
      }
    }
  }
  for (int head = 0; head < d.n_heads(); ++head) {
    data.slopes.push_back(std::exp2(-0.5f * static_cast<float>(head + 1)));
    data.sinks.push_back(3.0f * random.normal());
  }
  return data;
}

Outputs run_prefill(const PrefillCase& c, const PrefillData& data) {
  const DecodeCase& d = c.cache;
  const DeviceArray<float> q(data.q), value_factors(data.cache.value_factors), slopes(data.slopes),
      sinks(data.sinks);
  const DeviceArray<Half> key_sets(data.cache.key_sets), dense_k(data.dense_k),
      dense_v(data.dense_v), mask(data.mask);
  const DeviceArray<std::byte> pool(data.cache.pool);
  const DeviceArray<PageEntry> pages(data.cache.pages);
  const DeviceArray<std::uint8_t> key_orders(data.cache.key_orders);
  const DeviceArray<std::int32_t> page_cells(data.page_cells), dense_cells(data.dense_cells),
      row_begin(data.cache.row_begin), set_base(data.cache.set_base);
  DeviceArray<float> out(data.q.size()), lse(std::size_t(c.n_queries) * d.n_heads());

  PrefillParams p;
  p.n_queries = c.n_queries;
  p.n_kv_heads = d.n_kv_heads;
  p.n_heads = d.n_heads();
  p.head_dim = d.head_dim;
  p.scale = d.scale();
  p.softcap = c.softcap;
  p.q = q.data();
  p.q_head_stride = d.head_dim;
  p.q_query_stride = std::int64_t{d.n_heads()} * d.head_dim;
  p.out = out.data();
  p.lse = lse.data();
  p.mask = c.mask ? mask.data() : nullptr;
  p.mask_stride = data.n_cells;
  p.slopes = c.slopes ? slopes.data() : nullptr;
  p.sinks = c.sinks ? sinks.data() : nullptr;
  p.pool = reinterpret_cast<const std::uint8_t*>(pool.data());
  std::ranges::copy(d.classes, p.classes);
  p.pages = pages.data();
  p.page_cells = page_cells.data();
  p.row_begin = data.cache.pages.empty() ? nullptr : row_begin.data();
  p.set_base = set_base.data();
  p.key_sets = key_sets.data();
  p.key_orders = key_orders.data();
  p.value_factors = value_factors.data();
  p.n_dense = c.n_dense;
  p.dense_k = dense_k.data();
  p.dense_v = dense_v.data();
  p.dense_token_stride = (c.dense_as_tail ? 1 : d.n_kv_heads) * d.head_dim;
  p.dense_head_stride = (c.dense_as_tail ? c.n_dense : 1) * d.head_dim;
  p.dense_cells = dense_cells.data();
  p.n_splits = c.n_splits;
  DeviceArray<float> partials(prefill_partial_floats(p));
  DeviceArray<std::uint32_t> tickets(prefill_tickets(p), 0);
  p.partials = partials.data();
  p.tickets = tickets.data();
  const auto resident = prefill_resident_blocks(d.head_dim);
  EXPECT_TRUE(resident);

  Outputs first;
  for (int repeat = 0; repeat < 2; ++repeat) {
    out.fill(0xff);
    lse.fill(0xff);
    partials.fill(0xff);
    if (const Status status = prefill(p, nullptr); !status) {
      throw std::runtime_error(status.error().message);
    }
    const Outputs got{out.to_host(), lse.to_host()};
    if (repeat == 0) {
      first = got;
    }
    EXPECT_EQ(got.out, first.out);  // the same bits in every run
  }
  EXPECT_TRUE(out.guards_intact() && lse.guards_intact() && partials.guards_intact());
  EXPECT_EQ(tickets.to_host(), std::vector<std::uint32_t>(tickets.size(), 0));
  return first;
}

void check(const PrefillCase& c) {
  const DecodeCase& d = c.cache;
  const PrefillData data = make_data(c);
  const Outputs got = run_prefill(c, data);
  const std::vector<DecodedRow> rows = decode_rows(d, data.cache);
  AttentionCheck checked;
  for (int head = 0; head < d.n_kv_heads; ++head) {
    DecodedRow row = rows[head];
    std::vector<std::int32_t> cells;
    for (int page = data.cache.row_begin[head]; page < data.cache.row_begin[head + 1]; ++page) {
      const auto from = data.page_cells.begin() + std::ptrdiff_t(page) * kPageTokens;
      cells.insert(cells.end(), from, from + data.cache.pages[page].tokens);
    }
    for (int token = 0; token < c.n_dense; ++token) {
      cells.push_back(data.dense_cells[token]);
      for (int channel = 0; channel < d.head_dim; ++channel) {
        row.k.push_back(half_to_float(data.dense_k[dense_index(c, token, head) + channel]));
        row.v.push_back(half_to_float(data.dense_v[dense_index(c, token, head) + channel]));
      }
    }
    std::vector<std::uint8_t> visible;
    std::vector<float> bias, q, out, lse;
    for (int query = 0; query < c.n_queries; ++query) {
      for (const std::int32_t cell : cells) {
        const Half x = cell < 0  ? kHidden
                       : !c.mask ? Half{0}
                                 : data.mask[query * data.n_cells + cell];
        visible.push_back(x != kHidden);
        bias.push_back(x != kHidden ? half_to_float(x) : 0.0f);
      }
      const std::size_t first_head = std::size_t(query) * d.n_heads() + head * d.group;
      const std::size_t begin = first_head * d.head_dim, n = std::size_t(d.group) * d.head_dim;
      q.insert(q.end(), &data.q[begin], &data.q[begin] + n);
      out.insert(out.end(), &got.out[begin], &got.out[begin] + n);
      lse.insert(lse.end(), &got.lse[first_head], &got.lse[first_head] + d.group);
    }
    ref::AttentionCase a;
    a.n_rows = c.n_queries;
    a.n_heads = d.group;
    a.n_tokens = cells.size();
    a.n_kv_heads = 1;
    a.key_dim = a.value_dim = d.head_dim;
    a.q = q;
    a.k = row.k;
    a.v = row.v;
    a.visible = visible;
    a.bias = bias;
    a.scale = d.scale();
    a.softcap = c.softcap;
    if (c.sinks) {
      a.sinks = std::span(data.sinks).subspan(std::size_t(head) * d.group, d.group);
    }
    if (c.slopes) {
      a.slopes = std::span(data.slopes).subspan(std::size_t(head) * d.group, d.group);
    }
    checked.add(a, out, lse);
  }
  checked.expect_close();
}

PrefillCase small(int head_dim = 128) {
  PrefillCase c;
  c.cache.head_dim = head_dim;
  c.cache.class_tokens = {{70, 90}};
  c.n_dense = 33;
  return c;
}
// Query n of a chunk at the end of the cells sees those up to itself.
std::function<Half(int, int)> causal(int first) {
  return [=](int query, int cell) { return cell <= first + query ? Half{0} : kHidden; };
}

TEST_F(PrefillTest, EveryPairOfWidths) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int key_bits : {2, 3, 4, 8}) {
      for (const int value_bits : {2, 3, 4, 8}) {
        SCOPED_TRACE(::testing::Message()
                     << "head_dim " << head_dim << ", K " << key_bits << ", V " << value_bits);
        PrefillCase c;
        c.cache.head_dim = head_dim;
        c.cache.n_kv_heads = 1;
        c.cache.classes = {
            {static_cast<std::uint8_t>(key_bits), static_cast<std::uint8_t>(value_bits)}};
        c.cache.class_tokens = {{150}};
        c.cache.seed = key_bits * 10 + value_bits;
        check(c);
      }
    }
  }
}

// Queries follow the order of every block's channels, and come back for the dense tokens.
TEST_F(PrefillTest, WideChannels) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int chunks : wide_chunk_counts(head_dim)) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << chunks << " chunks");
      PrefillCase c = small(head_dim);
      const auto wide = static_cast<std::uint8_t>(chunks);
      c.cache.classes = {{4, 3}, {2, 3, wide, 4}, {2, 2, wide, 4}};
      c.cache.class_tokens = {{70, 90, 130}};
      c.cache.n_segments = 2;
      c.cache.seed = chunks;
      c.n_splits = chunks % 3 + 1;
      check(c);
    }
  }
}

TEST_F(PrefillTest, EveryLength) {
  for (const int n : {0, 1, 63, 64, 65, 200}) {
    for (const int n_dense : {0, 1, 63, 64, 65}) {
      SCOPED_TRACE(::testing::Message() << n << " sealed, " << n_dense << " dense");
      PrefillCase c = small();
      c.cache.n_kv_heads = 1;
      c.cache.class_tokens = {{n / 3, n - n / 3}};
      c.n_dense = n_dense;
      check(c);
      c.n_splits = 3;
      check(c);
    }
  }
}

TEST_F(PrefillTest, EveryGroupAndNumberOfQueries) {
  for (int group = 1; group <= 8; ++group) {
    for (const int n_queries : {1, prefill_tile_queries(group), prefill_tile_queries(group) + 1}) {
      SCOPED_TRACE(::testing::Message() << "group " << group << ", " << n_queries << " queries");
      PrefillCase c = small(64);
      c.cache.group = group;
      c.n_queries = n_queries;
      c.n_splits = group % 3 + 1;
      c.mask = causal(150);
      check(c);
    }
  }
}

TEST_F(PrefillTest, EveryHeadDimWithEverything) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int n_splits : {1, 2, 7}) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << n_splits << " parts");
      PrefillCase c = small(head_dim);
      c.n_queries = 40;
      c.dead_every = 5;
      c.n_splits = n_splits;
      c.softcap = 20;
      c.sinks = c.slopes = true;
      c.mask = [](int query, int cell) {  // a window of 100, with a distance bias
        const int distance = 150 + query - cell;
        return distance >= 0 && distance < 100 ? float_to_half(-0.25f * distance) : kHidden;
      };
      check(c);
      c.dense_as_tail = true;
      check(c);
    }
  }
}

TEST_F(PrefillTest, Masks) {
  PrefillCase c = small();
  c.n_queries = 20;
  c.mask = causal(170);
  check(c);
  c.mask = [](int query, int cell) { return cell % 3 == query % 3 ? Half{0} : kHidden; };
  check(c);  // sequences that share the cells
  c.mask = [](int query, int cell) { return query % 2 == 0 || cell == 7 ? kHidden : Half{0}; };
  check(c);  // rows that see nothing
  c.sinks = true;
  check(c);
  c.mask = [](int, int) { return kHidden; };
  check(c);
  c.mask = [](int, int cell) { return cell >= 180 ? Half{0} : kHidden; };
  check(c);  // whole pages hidden
}

TEST_F(PrefillTest, SegmentsWithScaleSetsOfTheirOwn) {
  PrefillCase c = small();
  c.cache.n_segments = 3;
  c.cache.class_tokens = {{300, 200}};
  c.n_splits = 2;
  check(c);
}

TEST_F(PrefillTest, NamesWhatIsMissing) {
  PrefillParams p;
  p.n_kv_heads = p.n_heads = 2;
  p.head_dim = 96;
  EXPECT_EQ(prefill(p, nullptr).error().message,
            "cuda prefill: required head_dim 96, supported head_dim 64, 128, 256, missing a kernel "
            "for it");
  p.head_dim = 128;
  p.n_splits = 2;
  EXPECT_FALSE(prefill(p, nullptr));
  EXPECT_FALSE(prefill_resident_blocks(80));
}

}  // namespace
}  // namespace zipcache::cuda
