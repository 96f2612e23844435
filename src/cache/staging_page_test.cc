#include "cache/staging_page.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace zipcache::cache {
namespace {

constexpr std::uint32_t kHeads = 3, kKeyDim = 48, kValueDim = 16;

StagingPage::Shape shape_of(std::uint32_t capacity, bool packed) {
  return {.capacity = capacity,
          .packed = packed,
          .key_row = kHeads * kKeyDim,
          .value_row = kHeads * kValueDim,
          .n_kv_heads = kHeads,
          .has_tokens = true,
          .has_squares = true};
}

std::vector<float> row_of(Tensor tensor, std::uint32_t token) {
  std::mt19937 random(token * 2 + (tensor == Tensor::kKey ? 1 : 0));
  std::normal_distribution<float> normal;
  std::vector<float> row(kHeads * (tensor == Tensor::kKey ? kKeyDim : kValueDim));
  for (float& x : row) {
    x = round_to_half(normal(random));
  }
  return row;
}

// Puts token t into slot t.
StagingPage filled(const StagingPage::Shape& shape) {
  StagingPage page(shape);
  for (std::uint32_t t = 0; t < shape.capacity; ++t) {
    page.cells[t] = 100 + t;
    page.reset_statistics(t, t);
    page.tokens[t].seen = 7 * t;
    page.mass[t * kHeads + 1] = static_cast<float>(t);
    page.squares[t * kHeads + 2] = static_cast<float>(2 * t);
    for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
      page.write(tensor, t, row_of(tensor, t).data());
    }
    ++page.used;
  }
  return page;
}

void expect_rows(const StagingPage& page, std::uint32_t slot, std::uint32_t token,
                 double tolerance) {
  std::vector<float> all_keys(std::size_t{page.shape.key_row} * page.capacity());
  page.read_all_keys(all_keys.data());
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const std::vector<float> expected = row_of(tensor, token);
    std::vector<float> row(expected.size());
    page.read(tensor, slot, row.data());
    for (std::size_t c = 0; c < row.size(); ++c) {
      ASSERT_NEAR(row[c], expected[c], tolerance) << token << ", channel " << c;
      if (tensor == Tensor::kKey) {
        ASSERT_EQ(all_keys[c * page.capacity() + slot], row[c]);
      }
    }
  }
}

TEST(StagingPage, RowsComeBack) {
  for (const std::uint32_t capacity : {1u, 4u, 31u, 32u}) {
    const StagingPage exact = filled(shape_of(capacity, false));
    const StagingPage packed = filled(shape_of(capacity, true));
    for (std::uint32_t t = 0; t < capacity; ++t) {
      expect_rows(exact, t, t, 0.0);
      expect_rows(packed, t, t, 4.5 / 127 / 2);  // Gaussian rows stay below 4.5
    }
    EXPECT_TRUE(exact.is_full());
  }
}

TEST(StagingPage, TokensMoveWithAllThatIsKnownOfThem) {
  std::vector<float> scratch;
  for (const bool from_packed : {false, true}) {
    for (const bool to_packed : {false, true}) {
      StagingPage from = filled(shape_of(5, from_packed));
      StagingPage to(shape_of(8, to_packed));
      for (const std::uint32_t t : {3u, 0u, 4u}) {
        std::vector<float> before(from.shape.key_row), after(before);
        from.read(Tensor::kKey, t, before.data());
        const std::uint32_t slot = from.move_to(to, t, scratch);
        to.read(Tensor::kKey, slot, after.data());
        if (from_packed == to_packed || from_packed) {  // a packed row is exact in fp16 or close
          for (std::size_t c = 0; c < before.size(); ++c) {
            ASSERT_NEAR(after[c], before[c], from_packed && !to_packed ? 2e-3 : 0.0);
          }
        }
        expect_rows(to, slot, t, from_packed || to_packed ? 4.5 / 127 / 2 + 2e-3 : 0.0);
        EXPECT_EQ(to.cells[slot], 100 + t);
        EXPECT_EQ(from.cells[t], kNoCell);
        EXPECT_EQ(to.tokens[slot].arrival, t);
        EXPECT_EQ(to.tokens[slot].seen, 7 * t);
        EXPECT_EQ(to.mass[slot * kHeads + 1], static_cast<float>(t));
        EXPECT_EQ(to.squares[slot * kHeads + 2], static_cast<float>(2 * t));
      }
      EXPECT_EQ(from.used, 2u);
      EXPECT_EQ(to.used, 3u);
    }
  }
}

TEST(StagingPage, GrowingMovesNothing) {
  for (const bool packed : {false, true}) {
    const StagingPage page = filled(shape_of(5, packed));
    const StagingPage grown = page.grown(9);
    EXPECT_EQ(grown.used, 5u);
    EXPECT_EQ(grown.free_slot(), 5u);
    for (std::uint32_t t = 0; t < 5; ++t) {
      expect_rows(grown, t, t, packed ? 4.5 / 127 / 2 : 0.0);
      EXPECT_EQ(grown.cells[t], 100 + t);
      EXPECT_EQ(grown.tokens[t].seen, 7 * t);
      EXPECT_EQ(grown.mass[t * kHeads + 1], static_cast<float>(t));
      EXPECT_EQ(grown.squares[t * kHeads + 2], static_cast<float>(2 * t));
    }
  }
}

TEST(StagingPage, BytesAreWhatItHolds) {
  for (const bool packed : {false, true}) {
    const StagingPage page(shape_of(12, packed));
    const std::size_t held =
        sizeof page + page.keys.size() + page.values.size() + page.scales.size() * sizeof(Half) +
        page.cells.size() * sizeof(std::uint32_t) + page.tokens.size() * sizeof(StagedToken) +
        (page.mass.size() + page.squares.size()) * sizeof(float);
    EXPECT_EQ(page.bytes(), held);
  }
}

TEST(StagingPage, PackingLeavesNoNan) {
  StagingPage exact(shape_of(4, false)), packed(shape_of(4, true));
  std::vector<float> row(kHeads * kValueDim, 1.0f), scratch;
  row[3] = NAN;
  row[20] = INFINITY;
  exact.write(Tensor::kValue, 0, row.data());
  exact.cells[0] = 9;
  exact.used = 1;
  EXPECT_TRUE(exact.has_non_finite);
  exact.move_to(packed, 0, scratch);
  EXPECT_FALSE(packed.has_non_finite);
  packed.read(Tensor::kValue, 0, row.data());
  for (const float x : row) {
    EXPECT_TRUE(std::isfinite(x));
  }
  EXPECT_EQ(row[3], 0.0f);
  EXPECT_NEAR(row[40], 1.0f, 0.01f);  // another head
}

}  // namespace
}  // namespace zipcache::cache
