// Each kernel against the loop that says what it does.
#include "kernels/cuda/window_kernels.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/cuda/device_test_util.h"

namespace zipcache::cuda {
namespace {

using WindowTest = DeviceTest;
constexpr HalfBits kHidden = 0xfc00;

std::vector<float> random_floats(std::size_t n, std::uint64_t seed) {
  Philox random(seed, 0, 0);
  std::vector<float> values(n);
  for (float& value : values) {
    value = static_cast<float>(random.below(2000)) / 500.0f - 2.0f;
  }
  return values;
}

TEST_F(WindowTest, MaskSummary) {
  for (const int n_rows : {1, 2, 33}) {
    for (const int n_cells : {1, 255, 256, 257, 700}) {
      const int n_planes = 2, stride = n_cells + 3;
      Philox random(1, n_rows, n_cells);
      std::vector<HalfBits> mask(std::size_t(n_planes) * n_rows * stride);
      for (HalfBits& value : mask) {
        value = random.below(8) == 0 ? kHidden : static_cast<HalfBits>(random.below(2) * 0x3c00);
      }
      std::fill_n(mask.begin(), n_cells, kHidden);  // a row that sees nothing
      const DeviceArray<HalfBits> given(mask);
      const DeviceArray<std::uint8_t> flags(std::size_t(n_planes) * n_cells);
      const DeviceArray<std::int32_t> counts(std::size_t(n_planes) * n_rows, 0);
      ASSERT_TRUE(summarize_mask({.n_planes = n_planes,
                                  .n_rows = n_rows,
                                  .n_cells = n_cells,
                                  .mask = given.data(),
                                  .plane_stride = std::int64_t(n_rows) * stride,
                                  .row_stride = stride,
                                  .flags = flags.data(),
                                  .row_counts = counts.data()},
                                 nullptr));
      const auto got_flags = flags.to_host();
      const auto got_counts = counts.to_host();
      for (int plane = 0; plane < n_planes; ++plane) {
        std::vector<int> seen_by(n_cells), sees(n_rows);
        for (int row = 0; row < n_rows; ++row) {
          for (int cell = 0; cell < n_cells; ++cell) {
            const bool seen = mask[(std::size_t(plane) * n_rows + row) * stride + cell] != kHidden;
            seen_by[cell] += seen;
            sees[row] += seen;
          }
          EXPECT_EQ(got_counts[plane * n_rows + row], sees[row]);
        }
        for (int cell = 0; cell < n_cells; ++cell) {
          EXPECT_EQ(
              got_flags[plane * n_cells + cell],
              (seen_by[cell] > 0 ? kSeenByAny : 0) | (seen_by[cell] == n_rows ? kSeenByAll : 0));
        }
      }
      EXPECT_TRUE(flags.guards_intact() && counts.guards_intact());
    }
  }
}

TEST_F(WindowTest, IngestPutsTokens) {
  const int sequences = 2, per_sequence = 3, kv_heads = 2, dim = 64, room = 9;
  const int n = sequences * per_sequence, width = kv_heads * dim;
  const auto k = random_floats(std::size_t(n) * width, 1), v = random_floats(k.size(), 2);
  const std::vector<std::int32_t> place{8, 0, 3, 1, 2, 7};
  const DeviceArray<float> dk(k), dv(v);
  const DeviceArray<std::int32_t> dplace(place);
  const std::size_t row_halves = std::size_t(sequences) * kv_heads * room * dim;
  const DeviceArray<HalfBits> to_k(row_halves, 0), to_v(row_halves, 0);
  IngestParams p;
  p.n_sequences = sequences;
  p.n_per_sequence = per_sequence;
  p.n_kv_heads = kv_heads;
  p.head_dim = dim;
  p.k = dk.data();
  p.v = dv.data();
  p.k_stride = p.v_stride = width;
  p.to = {to_k.data(), to_v.data(), std::int64_t(kv_heads) * room * dim, dim,
          std::int64_t(room) * dim};
  p.place = dplace.data();
  ASSERT_TRUE(ingest(p, nullptr));
  const auto got_k = to_k.to_host(), got_v = to_v.to_host();
  for (int token = 0; token < n; ++token) {
    const int sequence = token / per_sequence;
    for (int x = 0; x < width; ++x) {
      const std::size_t at =
          ((std::size_t(sequence) * kv_heads + x / dim) * room + place[token]) * dim + x % dim;
      EXPECT_EQ(got_k[at], float_to_half(k[std::size_t(token) * width + x]));
      EXPECT_EQ(got_v[at], float_to_half(v[std::size_t(token) * width + x]));
    }
  }
  EXPECT_TRUE(to_k.guards_intact() && to_v.guards_intact());
}

TEST_F(WindowTest, RowsMoveBetweenLayouts) {
  const int kv_heads = 2, dim = 64, room = 5;
  const std::size_t size = std::size_t(kv_heads) * room * dim;
  std::vector<HalfBits> rows(size);
  std::iota(rows.begin(), rows.end(), HalfBits{1});
  const DeviceArray<HalfBits> k(rows), v(rows), to_k(size, 0), to_v(size, 0);
  const std::vector<std::int32_t> from{4, 0, 2}, to{0, 1, 3};
  const DeviceArray<std::int32_t> dfrom(from), dto(to);
  const std::int64_t wide = std::int64_t(kv_heads) * dim;
  ASSERT_TRUE(move_rows({.n_tokens = 3,
                         .n_kv_heads = kv_heads,
                         .head_dim = dim,
                         .source = {k.data(), v.data(), 0, dim, std::int64_t(room) * dim},
                         .target = {to_k.data(), to_v.data(), 0, wide, dim},
                         .from = dfrom.data(),
                         .to = dto.data()},
                        nullptr));
  const auto got = to_k.to_host();
  EXPECT_EQ(got, to_v.to_host());
  for (std::size_t i = 0; i < from.size(); ++i) {
    for (int head = 0; head < kv_heads; ++head) {
      for (int c = 0; c < dim; ++c) {
        EXPECT_EQ(got[to[i] * wide + head * dim + c],
                  rows[(std::size_t(head) * room + from[i]) * dim + c]);
      }
    }
  }
}

TEST_F(WindowTest, ProbesAreGathered) {
  const int n_rows = 5, heads = 4, dim = 64;
  const auto q = random_floats(std::size_t(n_rows) * heads * dim, 5);
  const auto lse = random_floats(std::size_t(n_rows) * heads, 6);
  const std::vector<std::int32_t> rows{1, 4};
  const DeviceArray<float> dq(q), dlse(lse);
  const DeviceArray<std::int32_t> drows(rows);
  const DeviceArray<HalfBits> probe_q(rows.size() * heads * dim);
  const DeviceArray<float> probe_lse(rows.size() * heads);
  ASSERT_TRUE(gather_probes({.n_probes = 2,
                             .n_heads = heads,
                             .head_dim = dim,
                             .rows = drows.data(),
                             .q = dq.data(),
                             .q_query_stride = std::int64_t(heads) * dim,
                             .q_head_stride = dim,
                             .lse = dlse.data(),
                             .probe_q = probe_q.data(),
                             .probe_lse = probe_lse.data()},
                            nullptr));
  const auto got_q = probe_q.to_host();
  const auto got_lse = probe_lse.to_host();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    for (int x = 0; x < heads * dim; ++x) {
      EXPECT_EQ(got_q[i * heads * dim + x],
                float_to_half(q[std::size_t(rows[i]) * heads * dim + x]));
    }
    for (int head = 0; head < heads; ++head) {
      EXPECT_EQ(got_lse[i * heads + head], lse[std::size_t(rows[i]) * heads + head]);
    }
  }
}

TEST_F(WindowTest, RanksAreASortAndGiveThePagesTheirCells) {
  for (const int n : {1, 63, 64, 300}) {
    const int heads = 2;
    const std::int64_t stride = n + 7;
    auto saliency = random_floats(std::size_t(heads) * stride, n);
    saliency[n / 2] = std::numeric_limits<float>::quiet_NaN();
    for (float& value : saliency) {  // with ties
      value = std::floor(value * 4);
    }
    const DeviceArray<float> given(saliency);
    const DeviceArray<std::int32_t> order(std::size_t(heads) * n);
    const int n_pages = (n + kPageTokens - 1) / kPageTokens;
    const DeviceArray<std::uint16_t> kept(std::size_t(heads) * n_pages * kPageTokens, 0);
    ASSERT_TRUE(rank_tokens({.n_tokens = n,
                             .n_kv_heads = heads,
                             .saliency = given.data(),
                             .head_stride = stride,
                             .order = order.data(),
                             .kept = kept.data(),
                             .kept_stride = std::int64_t(n_pages) * kPageTokens},
                            nullptr));
    const auto got = order.to_host();
    std::vector<std::int32_t> cells(n);
    for (int i = 0; i < n; ++i) {
      cells[i] = i % 5 == 0 ? -1 : 1000 + i;
    }
    std::vector<PageSource> pages;
    for (int page = 0; page < heads * n_pages; ++page) {
      const int left = n - page % n_pages * kPageTokens;
      pages.push_back({static_cast<std::uint32_t>(page * kPageTokens), 0,
                       static_cast<std::uint32_t>(std::min(left, kPageTokens))});
    }
    const DeviceArray<PageSource> dpages(pages);
    const DeviceArray<std::int32_t> dcells(cells), page_cells(pages.size() * kPageTokens);
    ASSERT_TRUE(list_page_cells({.n_pages = static_cast<int>(pages.size()),
                                 .pages = dpages.data(),
                                 .kept = kept.data(),
                                 .block_cells = dcells.data(),
                                 .page_cells = page_cells.data()},
                                nullptr));
    const auto got_cells = page_cells.to_host();
    for (int head = 0; head < heads; ++head) {
      const auto score = [&](int token) {
        const float s = saliency[head * stride + token];
        return std::isnan(s) ? -std::numeric_limits<float>::infinity() : s;
      };
      std::vector<std::int32_t> wanted(n);
      std::iota(wanted.begin(), wanted.end(), 0);
      std::sort(wanted.begin(), wanted.end(),
                [&](int a, int b) { return score(a) != score(b) ? score(a) > score(b) : a > b; });
      for (int slot = 0; slot < n_pages * kPageTokens; ++slot) {
        EXPECT_EQ(got_cells[head * n_pages * kPageTokens + slot],
                  slot < n ? cells[wanted[slot]] : -1);
        if (slot < n) {
          EXPECT_EQ(got[head * n + slot], wanted[slot]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace zipcache::cuda
