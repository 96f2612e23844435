// Quantize-and-pack, the probe kernel and the tail, each against its formula.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "kernels/cuda/decode_case.h"
#include "kernels/cuda/host_page.h"

namespace zipcache::cuda {
namespace {

using PackTest = DeviceTest;
using ProbeTest = DeviceTest;

std::vector<Half> random_halves(std::size_t n, Random& random) {
  std::vector<Half> out(n);
  for (Half& x : out) {
    x = float_to_half(random.normal());
  }
  return out;
}

struct PackCase {
  int head_dim = 128;
  int n_kv_heads = 2;
  std::vector<PageClass> classes{{4, 4}, {2, 2}};
  std::vector<int> class_tokens;
  std::vector<int> key_set{0, 1};
  float clip = 1.0f;
  float wide_clip = 1.0f;
  bool with_query_power = true;
  bool keep_length = false;
  bool keep_factors = false;  // all of them 2

  int n_sets() const { return *std::max_element(key_set.begin(), key_set.end()) + 1; }
  int n_wide() const {
    int chunks = 0;
    for (const PageClass cls : classes) {
      chunks = std::max<int>(chunks, cls.wide_chunks);
    }
    return chunks * kChunkChannels;
  }
};

struct Packed {
  HostCache cache;  // one sequence
  std::vector<Half> k, v;
  std::vector<std::int32_t> order;
  std::vector<float> query_power;
};

Packed run_pack(const PackCase& c) {
  const int n = std::accumulate(c.class_tokens.begin(), c.class_tokens.end(), 0);
  Random random(n + c.head_dim);
  Packed packed;
  packed.k = random_halves(std::size_t(n) * c.n_kv_heads * c.head_dim, random);
  packed.v = random_halves(packed.k.size(), random);
  for (int n = 0; n < c.n_kv_heads * c.head_dim; ++n) {
    packed.query_power.push_back(static_cast<float>(random.below(4)));  // with equals and zeros
  }
  for (int head = 0; head < c.n_kv_heads; ++head) {
    std::vector<std::int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    for (int at = n - 1; at > 0; --at) {
      std::swap(order[at], order[random.below(at + 1)]);
    }
    packed.order.insert(packed.order.end(), order.begin(), order.end());
  }

  PackParams p;
  p.n_tokens = n;
  p.n_kv_heads = c.n_kv_heads;
  p.head_dim = c.head_dim;
  p.token_stride = c.n_kv_heads * c.head_dim;
  p.n_classes = static_cast<int>(c.classes.size());
  p.n_key_sets = c.n_sets();
  p.wide_clip = c.wide_clip;
  p.keep_length = c.keep_length;
  p.keep_factors = c.keep_factors;
  for (int cls = 0; cls < p.n_classes; ++cls) {
    p.classes[cls] = c.classes[cls];
    p.class_tokens[cls] = c.class_tokens[cls];
    p.key_set[cls] = c.key_set[cls];
    p.key_clip[cls] = p.value_clip[cls] = c.clip;
  }
  std::uint32_t unit = 0;
  HostCache& cache = packed.cache;
  for (int head = 0; head < c.n_kv_heads; ++head) {
    for (int cls = 0; cls < p.n_classes; ++cls) {
      for (int first = 0; first < c.class_tokens[cls]; first += kPageTokens) {
        PageEntry entry;
        entry.unit = unit;
        entry.set = static_cast<std::uint16_t>(c.key_set[cls]);
        entry.tokens =
            static_cast<std::uint8_t>(std::min(c.class_tokens[cls] - first, kPageTokens));
        entry.cls = static_cast<std::uint8_t>(cls);
        cache.pages.push_back(entry);
        unit += page_bytes(c.head_dim, c.classes[cls]) / kTileAlignment;
      }
    }
    cache.row_begin.push_back(static_cast<std::int32_t>(cache.pages.size()));
    cache.set_base.push_back(head * p.n_key_sets);
  }
  const DeviceArray<Half> k(packed.k), v(packed.v);
  const DeviceArray<std::int32_t> order(packed.order);
  const DeviceArray<PageEntry> pages(cache.pages);
  DeviceArray<std::byte> pool(std::size_t{unit} * kTileAlignment);
  DeviceArray<Half> key_sets(std::size_t(c.n_kv_heads) * p.n_key_sets * 2 * c.head_dim);
  DeviceArray<std::uint8_t> key_orders(std::size_t(c.n_kv_heads) * p.n_key_sets * c.head_dim, 0xff);
  const DeviceArray<float> query_power(packed.query_power);
  DeviceArray<float> factors(std::vector<float>(std::size_t(c.n_kv_heads) * c.head_dim, 2.0f));
  DeviceArray<std::uint32_t> workspace(pack_workspace_words(p), 0);
  p.k = k.data();
  p.v = v.data();
  p.order = order.data();
  p.pages = pages.data();
  p.pool = reinterpret_cast<std::uint8_t*>(pool.data());
  p.key_sets = key_sets.data();
  p.key_orders = c.n_wide() > 0 ? key_orders.data() : nullptr;
  p.query_power = c.with_query_power ? query_power.data() : nullptr;
  p.value_factors = factors.data();
  p.workspace = workspace.data();
  EXPECT_EQ(pack_pages(p) * c.n_kv_heads, static_cast<int>(cache.pages.size()));
  // Of a batch every problem is the same as alone.
  DeviceArray<std::byte> pool2(pool.size());
  DeviceArray<Half> key_sets2(key_sets.size());
  DeviceArray<std::uint8_t> key_orders2(key_orders.size(), 0xff);
  DeviceArray<float> factors2(factors.to_host());
  DeviceArray<std::uint32_t> workspace2(workspace.size(), 0);
  PackParams second = p;
  second.pool = reinterpret_cast<std::uint8_t*>(pool2.data());
  second.key_sets = key_sets2.data();
  second.key_orders = c.n_wide() > 0 ? key_orders2.data() : nullptr;
  second.value_factors = factors2.data();
  second.workspace = workspace2.data();
  const PackParams batch[] = {p, second};
  const Status status = pack(std::span(batch, n <= 300 ? 2 : 1), nullptr);
  EXPECT_TRUE(status) << (status ? "" : status.error().message);
  if (n <= 300) {
    EXPECT_EQ(pool.to_host(), pool2.to_host());
    EXPECT_EQ(key_sets.to_host(), key_sets2.to_host());
    EXPECT_EQ(key_orders.to_host(), key_orders2.to_host());
    EXPECT_EQ(factors.to_host(), factors2.to_host());
  }
  EXPECT_EQ(workspace.to_host(), std::vector<std::uint32_t>(workspace.size(), 0));
  cache.pool = pool.to_host();
  cache.key_sets = key_sets.to_host();
  cache.key_orders = key_orders.to_host();
  cache.value_factors = factors.to_host();
  EXPECT_TRUE(pool.guards_intact() && key_sets.guards_intact() && key_orders.guards_intact() &&
              factors.guards_intact() && workspace.guards_intact());
  return packed;
}

int code_of(float x, float low, float scale, int bits) {
  const float code = std::nearbyint((x - low) / scale);
  return static_cast<int>(std::clamp(code, 0.0f, static_cast<float>((1 << bits) - 1)));
}

// Channels of a head in the order in which they are stored, by the formula.
std::vector<int> stored_channels(const PackCase& c, const Packed& packed, int head) {
  const std::size_t n = packed.k.size() / (std::size_t(c.n_kv_heads) * c.head_dim);
  std::vector<int> channels(c.head_dim);
  std::iota(channels.begin(), channels.end(), 0);
  std::vector<float> error;
  for (const int channel : channels) {
    float low = INFINITY, high = -INFINITY;
    for (std::size_t token = 0; token < n; ++token) {
      const float x = half_to_float(packed.k[(token * c.n_kv_heads + head) * c.head_dim + channel]);
      low = std::min(low, x), high = std::max(high, x);
    }
    const float range = high - low;
    error.push_back(range * range *
                    (c.with_query_power ? packed.query_power[head * c.head_dim + channel] : 1));
  }
  std::ranges::stable_sort(channels, std::greater(), [&](int channel) { return error[channel]; });
  std::sort(channels.begin(), channels.begin() + c.n_wide());
  std::sort(channels.begin() + c.n_wide(), channels.end());
  return channels;
}

void check_pack(const PackCase& c) {
  const Packed packed = run_pack(c);
  const int n = std::accumulate(c.class_tokens.begin(), c.class_tokens.end(), 0);
  const int stride = c.n_kv_heads * c.head_dim;
  for (int head = 0; head < c.n_kv_heads; ++head) {
    const float* factors = &packed.cache.value_factors[std::size_t(head) * c.head_dim];
    int first_slot = 0, page_index = packed.cache.row_begin[head];
    const std::vector<int> wide_order = stored_channels(c, packed, head);

    // Key parameters: the range of the set's tokens, shrunk about its centre.
    for (int set = 0; set < c.n_sets(); ++set) {
      const std::size_t set_at = std::size_t(packed.cache.set_base[head] + set) * c.head_dim;
      const Half* stored = &packed.cache.key_sets[2 * set_at];
      const auto of_set = std::ranges::find(c.key_set, set) - c.key_set.begin();
      const PageClass widths = c.classes[of_set];
      for (int at = 0; at < c.head_dim; ++at) {
        const int channel = widths.wide_chunks > 0 ? wide_order[at] : at;
        ASSERT_EQ(packed.cache.key_orders[set_at + at],
                  widths.wide_chunks > 0 ? channel : 0xff);  // else nothing is written
        float low = INFINITY, high = -INFINITY;
        int slot = 0;
        for (std::size_t cls = 0; cls < c.classes.size(); ++cls) {
          for (int n_of_class = 0; n_of_class < c.class_tokens[cls]; ++n_of_class, ++slot) {
            if (c.key_set[cls] != set) {
              continue;
            }
            const int token = packed.order[std::size_t(head) * n + slot];
            const float x =
                half_to_float(packed.k[std::size_t(token) * stride + head * c.head_dim + channel]);
            low = std::min(low, x);
            high = std::max(high, x);
          }
        }
        if (low > high) {
          continue;
        }
        const bool is_wide = std::find(wide_order.begin(), wide_order.begin() + c.n_wide(),
                                       channel) != wide_order.begin() + c.n_wide();
        const float width = (high - low) * (is_wide ? c.wide_clip : c.clip);
        const float levels = static_cast<float>((1 << widths.chunk_bits(at / kChunkChannels)) - 1);
        const float step = width / levels;
        ASSERT_NEAR(half_to_float(stored[at]), step > 0 ? step : 1.0f, step * 0x1p-10f);
        ASSERT_NEAR(half_to_float(stored[c.head_dim + at]), (low + high - width) / 2,
                    std::abs(low) * 0x1p-10f + 1e-6f);
      }
    }

    for (std::size_t cls = 0; cls < c.classes.size(); ++cls) {
      const PageClass bits = c.classes[cls];
      for (int at = 0; at < c.class_tokens[cls]; ++at) {
        const PageEntry entry = packed.cache.pages[page_index + at / kPageTokens];
        std::byte* bytes =
            const_cast<std::byte*>(&packed.cache.pool[std::size_t{entry.unit} * kTileAlignment]);
        const HostPage page({bytes, static_cast<std::size_t>(page_bytes(c.head_dim, bits))},
                            c.head_dim, bits);
        const int in_page = at % kPageTokens;
        const int token = packed.order[std::size_t(head) * n + first_slot + at];
        const std::size_t from = std::size_t(token) * stride + std::size_t(head) * c.head_dim;
        const Half* set =
            &packed.cache.key_sets[std::size_t(packed.cache.set_base[head] + c.key_set[cls]) * 2 *
                                   c.head_dim];
        const float stored_scale = half_to_float(page.scale(in_page));
        const float zero = half_to_float(page.zero(in_page));
        float low = INFINITY, high = -INFINITY;
        for (int channel = 0; channel < c.head_dim; ++channel) {
          const float v = half_to_float(packed.v[from + channel]) / factors[channel];
          low = std::min(low, v);
          high = std::max(high, v);
        }
        // The scale that codes are made with; with keep_length it is stretched afterwards.
        const float width = (high - low) * c.clip;
        const float levels = static_cast<float>((1 << bits.value_bits) - 1);
        const float scale =
            c.keep_length
                ? half_to_float(float_to_half((high - (high - low) * ((1 - c.clip) * 0.5f) -
                                               (low + (high - low) * ((1 - c.clip) * 0.5f))) /
                                              levels))
                : stored_scale;
        double exact = 0, across = 0;
        for (int stored = 0; stored < c.head_dim; ++stored) {
          const int channel = bits.wide_chunks > 0 ? wide_order[stored] : stored;
          const float k = half_to_float(packed.k[from + channel]);
          ASSERT_EQ(page.key_code(in_page, stored),
                    code_of(k, half_to_float(set[c.head_dim + stored]), half_to_float(set[stored]),
                            bits.chunk_bits(stored / kChunkChannels)));
          const float raw = half_to_float(packed.v[from + channel]);
          const int code = page.value_code(in_page, channel);
          ASSERT_EQ(code, code_of(raw / factors[channel], -zero * scale, scale, bits.value_bits))
              << "head " << head << " class " << cls << " token " << at << " channel " << channel;
          exact += double{raw} * raw;
          across += double{raw} * factors[channel] * scale * (code - double{zero});
        }
        const double stretch =
            c.keep_length && across > 0 && exact / across >= 0.5 && exact / across <= 2
                ? exact / across
                : 1;
        ASSERT_NEAR(stored_scale, width / levels * stretch, width / levels * 0x1p-9f);
        ASSERT_NEAR(zero, -(low + high - width) / 2 / scale, levels * 0x1p-9f);
        ASSERT_LT(stored_scale, 8.0f);
      }
      first_slot += c.class_tokens[cls];
      page_index += (c.class_tokens[cls] + kPageTokens - 1) / kPageTokens;
    }
  }

  // And the pages are what decode attention takes.
  DecodeCase d;
  d.head_dim = c.head_dim;
  d.n_kv_heads = c.n_kv_heads;
  d.group = 2;
  d.classes = c.classes;
  d.class_tokens = {c.class_tokens};
  HostCache cache = packed.cache;
  Random random(3);
  cache.q = random_halves(std::size_t(d.n_heads()) * d.head_dim, random);
  expect_attention(d, cache, run_decode(d, cache)[0]);
}

TEST_F(PackTest, EveryWidth) {
  const std::vector<PageClass> pairs[] = {
      {{2, 3}, {8, 2}}, {{3, 4}, {4, 3}}, {{4, 8}, {2, 4}}, {{8, 2}, {3, 8}}};
  for (const int head_dim : {64, 128, 256}) {
    for (const std::vector<PageClass>& classes : pairs) {
      SCOPED_TRACE(::testing::Message()
                   << "head_dim " << head_dim << ", K " << int{classes[0].key_bits});
      PackCase c;
      c.head_dim = head_dim;
      c.classes = classes;
      c.class_tokens = {150, 77};
      check_pack(c);
    }
  }
}

TEST_F(PackTest, ClassesOfTheDefaultPolicy) {
  for (const int head_dim : {64, 128, 256}) {
    SCOPED_TRACE(head_dim);
    PackCase c;
    c.head_dim = head_dim;
    const auto wide = static_cast<std::uint8_t>(head_dim / 2 / kChunkChannels);
    c.classes = {{4, 3}, {2, 3, wide, 4}, {2, 2, wide, 4}};
    c.class_tokens = {200, 300, 500};
    c.key_set = {0, 1, 1};
    c.clip = 0.75f;
    c.keep_length = true;
    check_pack(c);
  }
}

TEST_F(PackTest, LaterSegmentsKeepTheFactors) {
  PackCase c;
  c.class_tokens = {100, 150};
  c.keep_factors = true;
  check_pack(c);
  EXPECT_EQ(run_pack(c).cache.value_factors,
            std::vector<float>(std::size_t(c.n_kv_heads) * c.head_dim, 2.0f));
}

TEST_F(PackTest, WideChannels) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int chunks : wide_chunk_counts(head_dim)) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << chunks << " chunks");
      PackCase c;
      c.head_dim = head_dim;
      const auto wide = static_cast<std::uint8_t>(chunks);
      c.classes = {{2, 2, wide, 4}, {4, 3}};
      c.class_tokens = {97, chunks % 2 * 64};  // a set without tokens has no say
      c.clip = 0.8f;
      c.wide_clip = 0.95f;
      c.with_query_power = chunks % 2 == 0;
      check_pack(c);
    }
  }
}

TEST_F(PackTest, QueryPower) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int n : {0, 1, 31, 500}) {
      for (const int group : {1, 3}) {
        SCOPED_TRACE(::testing::Message()
                     << "head_dim " << head_dim << ", " << n << " queries, group " << group);
        const int n_kv_heads = 2, n_heads = n_kv_heads * group;
        Random random(n + group);
        const std::vector<Half> q = random_halves(std::size_t(n) * n_heads * head_dim, random);
        std::vector<double> want(n_kv_heads * head_dim);
        for (std::size_t at = 0; at < q.size(); ++at) {
          const std::size_t head = at / head_dim % n_heads;
          want[head / group * head_dim + at % head_dim] += std::pow(half_to_float(q[at]), 2.0);
        }
        const DeviceArray<Half> queries(q);
        DeviceArray<float> power(want.size());
        QueryPowerParams p;
        p.n_queries = n;
        p.n_kv_heads = n_kv_heads;
        p.n_heads = n_heads;
        p.head_dim = head_dim;
        p.q = queries.data();
        p.power = power.data();
        for (int times = 1; times <= 2; ++times) {
          ASSERT_TRUE(query_power(p, nullptr));
          const std::vector<float> got = power.to_host();
          for (std::size_t at = 0; at < want.size(); ++at) {
            ASSERT_NEAR(got[at], times * want[at], 1e-5 * times * want[at]) << at;
          }
          p.add = true;
        }
        EXPECT_TRUE(power.guards_intact());
      }
    }
  }
}

TEST_F(PackTest, EdgesOfPages) {
  for (const int n : {1, 31, 32, 33, 63, 64, 65, 128, 129}) {
    SCOPED_TRACE(n);
    PackCase c;
    c.class_tokens = {n, 0};
    check_pack(c);
    c.class_tokens = {1, n};
    check_pack(c);
  }
}

TEST_F(ProbeTest, ColumnSums) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int n : {1, 5, 255, 256, 257, 700}) {
      for (const int group : {1, 3, 4}) {
        SCOPED_TRACE(::testing::Message()
                     << "head_dim " << head_dim << ", " << n << " tokens, group " << group);
        const int n_kv_heads = 2, n_heads = n_kv_heads * group;
        Random random(n);
        std::vector<std::int32_t> positions;
        for (int at = 0; at < n; ++at) {
          if (at + 7 >= n || random.below(10) == 0) {
            positions.push_back(at);
          }
        }
        const int n_probes = static_cast<int>(positions.size());
        const std::vector<Half> q =
            random_halves(std::size_t(n_probes) * n_heads * head_dim, random);
        const std::vector<Half> k = random_halves(std::size_t(n) * n_kv_heads * head_dim, random);
        const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));

        std::vector<float> lse(std::size_t(n_probes) * n_heads);
        std::vector<double> expected(std::size_t(n_kv_heads) * n), scores(n);
        for (int probe = 0; probe < n_probes; ++probe) {
          for (int head = 0; head < n_heads; ++head) {
            double sum = 0;
            for (int token = 0; token <= positions[probe]; ++token) {
              double dot = 0;
              for (int c = 0; c < head_dim; ++c) {
                dot +=
                    double{half_to_float(q[(std::size_t(probe) * n_heads + head) * head_dim + c])} *
                    half_to_float(
                        k[(std::size_t(token) * n_kv_heads + head / group) * head_dim + c]);
              }
              scores[token] = std::exp(dot * scale);
              sum += scores[token];
            }
            lse[std::size_t(probe) * n_heads + head] = static_cast<float>(std::log2(sum));
            for (int token = 0; token <= positions[probe]; ++token) {
              expected[std::size_t(head / group) * n + token] += scores[token] / sum;
            }
          }
        }

        ProbeParams p;
        p.n_tokens = n;
        p.n_probes = n_probes;
        p.n_kv_heads = n_kv_heads;
        p.n_heads = n_heads;
        p.head_dim = head_dim;
        p.scale = scale;
        const DeviceArray<Half> dq(q), dk(k);
        const DeviceArray<float> dlse(lse);
        const DeviceArray<std::int32_t> dpositions(positions);
        DeviceArray<float> saliency(expected.size());
        p.q = dq.data();
        p.k = dk.data();
        p.token_stride = n_kv_heads * head_dim;
        p.lse = dlse.data();
        p.positions = dpositions.data();
        p.saliency = saliency.data();
        ASSERT_TRUE(probe_saliency(p, nullptr));
        const std::vector<float> got = saliency.to_host();
        EXPECT_TRUE(saliency.guards_intact());
        for (int head = 0; head < n_kv_heads; ++head) {
          for (int token = 0; token < n; ++token) {
            const auto n_seeing =
                positions.end() - std::lower_bound(positions.begin(), positions.end(), token);
            const double want =
                expected[std::size_t(head) * n + token] / static_cast<double>(n_seeing * group);
            ASSERT_NEAR(got[std::size_t(head) * n + token], want, 5e-5 * want + 1e-9)
                << "head " << head << " token " << token;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace zipcache::cuda
