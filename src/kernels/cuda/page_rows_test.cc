// Pages written code by code come out as the rows that their parameters say.
#include "kernels/cuda/page_rows.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/cuda/device_test_util.h"
#include "kernels/cuda/host_page.h"

namespace zipcache::cuda {
namespace {

using PageRowsTest = DeviceTest;

TEST_F(PageRowsTest, UnpackedRowsAreTheFormula) {
  const std::vector<PageClass> classes{{4, 2}, {3, 3}, {2, 8}, {8, 4}, {2, 3, 1, 4}};
  for (const int head_dim : {64, 128, 256}) {
    const int n_kv_heads = 3, per_head = static_cast<int>(classes.size()),
              n_pages = n_kv_heads * per_head, n_rows = 400;
    Random random(head_dim);
    std::vector<std::byte> pool;
    std::vector<PageEntry> pages;
    std::vector<std::int32_t> page_rows(n_pages * kPageTokens, -1);
    std::vector<HalfBits> sets(2 * n_kv_heads * 2 * head_dim);
    std::vector<std::uint8_t> orders(2 * n_kv_heads * head_dim);  // stored -> channel
    for (int set = 0; set < 2 * n_kv_heads; ++set) {
      const auto order = orders.begin() + set * head_dim;
      std::iota(order, order + head_dim, 0);
      for (int c = head_dim - 1; c > 0; --c) {
        std::swap(order[c], order[random.below(c + 1)]);
      }
    }
    std::vector<float> factors(n_kv_heads * head_dim);
    for (HalfBits& x : sets) {
      x = float_to_half(random.uniform(-1, 1));
    }
    for (float& x : factors) {
      x = random.uniform(0.1f, 2);
    }
    const int first_row = 40, end_row = 250;
    std::vector<float> want_k(n_rows * n_kv_heads * head_dim, NAN), want_v = want_k;
    for (int head = 0; head < n_kv_heads; ++head) {
      std::vector<int> rows(n_rows);
      std::iota(rows.begin(), rows.end(), 0);
      for (int n = 0; n < per_head; ++n) {
        const PageClass cls = classes[n];
        const int tokens = n == 1 ? 1 : n == 3 ? 33 : 64;
        const int set = head * 2 + n % 2;
        pages.push_back({static_cast<std::uint32_t>(pool.size() / kTileAlignment),
                         static_cast<std::uint16_t>(set), static_cast<std::uint8_t>(tokens),
                         static_cast<std::uint8_t>(n)});
        const std::size_t begin = pool.size();
        pool.resize(begin + page_bytes(head_dim, cls));
        HostPage page({pool.data() + begin, pool.size() - begin}, head_dim, cls);
        for (int token = 0; token < tokens; ++token) {
          const int at = random.below(static_cast<std::uint32_t>(rows.size()));
          const int row = token == 5 ? -1 : rows[at];  // 5: dead
          rows.erase(rows.begin() + at);
          page_rows[((head * per_head) + n) * kPageTokens + token] = row;
          const Half s = float_to_half(random.uniform(0.1f, 1)),
                     z = float_to_half(random.uniform(0, 3));
          page.set_scale_zero(token, s, z);
          for (int c = 0; c < head_dim; ++c) {
            const int key_bits =
                c < cls.wide_chunks * kChunkChannels ? cls.wide_bits : cls.key_bits;
            const int k = random.below(1u << key_bits), v = random.below(1u << cls.value_bits);
            page.set_key_code(token, c, k);
            page.set_value_code(token, c, v);
            if (row < first_row || row >= end_row) {
              continue;
            }
            const std::size_t head_at = (row * n_kv_heads + head) * head_dim;
            const int channel = cls.wide_chunks > 0 ? orders[set * head_dim + c] : c;
            want_k[head_at + channel] = half_to_float(sets[set * 2 * head_dim + c]) * k +
                                        half_to_float(sets[(set * 2 + 1) * head_dim + c]);
            want_v[head_at + c] =
                factors[head * head_dim + c] * half_to_float(s) * (v - half_to_float(z));
          }
        }
      }
    }
    const std::vector<std::uint8_t> bytes(
        reinterpret_cast<const std::uint8_t*>(pool.data()),
        reinterpret_cast<const std::uint8_t*>(pool.data()) + pool.size());
    const DeviceArray<std::uint8_t> device_pool(bytes);
    const DeviceArray<PageEntry> device_pages(pages);
    const DeviceArray<std::int32_t> device_rows(page_rows);
    const DeviceArray<HalfBits> device_sets(sets);
    const DeviceArray<std::uint8_t> device_orders(orders);
    const DeviceArray<float> device_factors(factors);
    const std::size_t size = std::size_t(end_row - first_row) * n_kv_heads * head_dim;
    const DeviceArray<HalfBits> k(size), v(size);
    UnpackParams p;
    p.n_pages = n_pages, p.n_kv_heads = n_kv_heads, p.head_dim = head_dim;
    p.pool = device_pool.data();
    std::copy(classes.begin(), classes.end(), p.classes);
    p.pages = device_pages.data();
    p.page_rows = device_rows.data();
    p.first_row = first_row, p.end_row = end_row;
    p.key_sets = device_sets.data();
    p.key_orders = device_orders.data();
    p.value_factors = device_factors.data();
    p.to = {k.data(), v.data(), 0, std::int64_t{n_kv_heads} * head_dim, head_dim};
    ASSERT_TRUE(unpack_pages(p, nullptr));
    const auto got_k = k.to_host(), got_v = v.to_host();
    int n_compared = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const std::size_t at = i + std::size_t(first_row) * n_kv_heads * head_dim;
      if (std::isnan(want_k[at])) {
        EXPECT_EQ(got_k[i], 0xffff) << i;  // left as it was
        EXPECT_EQ(got_v[i], 0xffff) << i;
        continue;
      }
      ++n_compared;
      ASSERT_NEAR(half_to_float(got_k[i]), want_k[at], std::abs(want_k[at]) * 0x1p-10f + 1e-3f)
          << i;
      ASSERT_NEAR(half_to_float(got_v[i]), want_v[at], std::abs(want_v[at]) * 0x1p-10f + 1e-3f)
          << i;
    }
    EXPECT_GT(n_compared, 0);
    EXPECT_TRUE(k.guards_intact() && v.guards_intact());
  }
}

TEST_F(PageRowsTest, OrdersAreTheRanks) {
  for (const int n_tokens : {1, 255, 256, 257}) {
    const int n_kv_heads = 2, stride = n_tokens + 7;
    Random random(n_tokens);
    std::vector<std::uint16_t> kept(n_kv_heads * stride);
    for (auto& x : kept) {
      x = static_cast<std::uint16_t>(random.below(65536));
    }
    const DeviceArray<std::uint16_t> given(kept);
    const DeviceArray<std::int32_t> order(n_kv_heads * n_tokens);
    ASSERT_TRUE(
        order_of_ranks({n_tokens, n_kv_heads, given.data(), stride, order.data()}, nullptr));
    const auto got = order.to_host();
    for (int n = 0; n < n_kv_heads * n_tokens; ++n) {
      ASSERT_EQ(got[n], kept[n / n_tokens * stride + n % n_tokens]) << n;
    }
  }
}

TEST_F(PageRowsTest, KeysThereAndBack) {
  const int n_tokens = 5, n_kv_heads = 2, head_dim = 64;
  Random random(3);
  // Head-major, as a tail is.
  std::vector<HalfBits> rows(n_kv_heads * 8 * head_dim);
  for (HalfBits& x : rows) {
    x = float_to_half(random.normal());
  }
  const DeviceArray<HalfBits> given(rows), back(rows.size());
  const DeviceArray<float> floats(std::size_t(n_tokens) * n_kv_heads * head_dim);
  ConvertParams p{n_tokens,
                  n_kv_heads,
                  head_dim,
                  {given.data(), nullptr, 0, head_dim, 8 * head_dim},
                  floats.data()};
  ASSERT_TRUE(keys_to_floats(p, nullptr));
  p.rows.k = back.data();
  ASSERT_TRUE(floats_to_keys(p, nullptr));
  const auto full = floats.to_host();
  const auto got = back.to_host();
  for (int token = 0; token < n_tokens; ++token) {
    for (int n = 0; n < n_kv_heads * head_dim; ++n) {
      const std::size_t at = (n / head_dim * 8 + token) * head_dim + n % head_dim;
      EXPECT_EQ(full[token * n_kv_heads * head_dim + n], half_to_float(rows[at]));
      EXPECT_EQ(got[at], rows[at]);
    }
  }
  EXPECT_TRUE(floats.guards_intact());
}

}  // namespace
}  // namespace zipcache::cuda
