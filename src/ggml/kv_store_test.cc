#include "ggml/kv_store.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "base/half.h"

namespace zipcache::ggml {
namespace {

constexpr KvStore::Shape kShape{
    .layer = 3, .n_streams = 2, .n_cells = 300, .key_row = 32, .value_row = 48};
constexpr std::uint64_t kWriter = 7;

class KvStoreTest : public ::testing::Test {
 protected:
  KvStoreTest() {
    policy::Policy fp16;
    fp16.keeps_exact = true;
    policy_ = std::make_shared<const policy::Policy>(fp16);
    store_ = make_store();
  }

  std::unique_ptr<KvStore> make_store() const {
    return std::make_unique<KvStore>(kShape, policy_, std::make_shared<cache::Budget>());
  }

  static std::vector<Half> numbered(std::size_t n, int first) {
    std::vector<Half> halves(n);
    for (std::size_t i = 0; i < n; ++i) {
      halves[i] = float_to_half(static_cast<float>(first + static_cast<int>(i % 1000)));
    }
    return halves;
  }

  std::vector<Half> read_rows(const KvStore& store, Tensor tensor, std::size_t first_row,
                              std::size_t n) const {
    const std::size_t row = store.row_bytes(tensor);
    std::vector<Half> rows(n * row / sizeof(Half));
    store.read(tensor, first_row * row, n * row, rows.data());
    return rows;
  }

  std::shared_ptr<const policy::Policy> policy_;
  std::unique_ptr<KvStore> store_;
};

TEST(KvName, OnlyTheCacheTensorsThemselves) {
  const auto keys = parse_kv_name("cache_k_l12");
  ASSERT_TRUE(keys);
  EXPECT_EQ(keys->tensor, Tensor::kKey);
  EXPECT_EQ(keys->layer, 12u);
  const auto values = parse_kv_name("cache_v_l0");
  ASSERT_TRUE(values);
  EXPECT_EQ(values->tensor, Tensor::kValue);
  for (const char* other : {"", "cache_k_l", "cache_k_l3 (view)", "cache_k_l-1", "cache_r_l3",
                            "cache_idx_k_l3", "cache_k_l3x", "cache_k_l99999999999", "Kcur-3"}) {
    EXPECT_FALSE(parse_kv_name(other)) << other;
  }
}

TEST_F(KvStoreTest, NeverWrittenReadsAsZerosAndCostsNothing) {
  std::vector<std::byte> bytes(store_->tensor_bytes(Tensor::kValue), std::byte{0xcd});
  store_->read(Tensor::kValue, 0, bytes.size(), bytes.data());
  EXPECT_EQ(bytes, std::vector<std::byte>(bytes.size()));
  EXPECT_EQ(store_->live_tokens(), 0u);
}

// Whole rows, parts of rows, across the border of two streams, unaligned addresses.
TEST_F(KvStoreTest, BytesComeBackFromAnyOffset) {
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    std::vector<std::byte> model(store_->tensor_bytes(tensor));
    const std::size_t row = store_->row_bytes(tensor);
    const std::vector<Half> source = numbered(model.size() / sizeof(Half), 1);
    const auto* bytes = reinterpret_cast<const std::byte*>(source.data());
    const struct {
      std::size_t offset, size;
    } ranges[] = {{0, row},
                  {row * 5, row * 7},
                  {row * 298, row * 4},
                  {row * 40 + 6, 10},
                  {row * 50 + 2, row * 3},
                  {row * 100, row * 200 - 8},
                  {model.size() - 2, 2}};
    for (const auto& range : ranges) {
      std::vector<std::byte> unaligned(range.size + 1);
      std::memcpy(unaligned.data() + 1, bytes + range.offset, range.size);
      ASSERT_TRUE(store_->write(tensor, range.offset, range.size, unaligned.data() + 1));
      std::memcpy(model.data() + range.offset, bytes + range.offset, range.size);
    }
    std::vector<std::byte> all(model.size());
    store_->read(tensor, 0, all.size(), all.data());
    EXPECT_EQ(all, model);
    std::vector<std::byte> odd(row * 9 + 5);
    store_->read(tensor, row * 297 + 3, odd.size(), odd.data());
    EXPECT_EQ(std::memcmp(odd.data(), model.data() + row * 297 + 3, odd.size()), 0);
  }
}

TEST_F(KvStoreTest, ZerosOverNothingBringNoCellToLife) {
  const std::vector<std::byte> zeros(store_->tensor_bytes(Tensor::kKey));
  ASSERT_TRUE(store_->write(Tensor::kKey, 0, zeros.size(), zeros.data()));
  EXPECT_EQ(store_->live_tokens(), 0u);
  const std::vector<Half> row = numbered(kShape.key_row, 1);
  ASSERT_TRUE(store_->write(Tensor::kKey, store_->row_bytes(Tensor::kKey) * 9,
                            store_->row_bytes(Tensor::kKey), row.data()));
  EXPECT_EQ(store_->live_tokens(), 1u);
  ASSERT_TRUE(store_->write_zeros(Tensor::kKey, 0, zeros.size()));
  EXPECT_EQ(read_rows(*store_, Tensor::kKey, 9, 1), std::vector<Half>(kShape.key_row));
}

TEST_F(KvStoreTest, PutGoesToTheStreamsOfItsRows) {
  const std::vector<std::int64_t> rows{4, 2, 300 + 1, 300 + 299};
  const std::vector<Half> keys = numbered(rows.size() * kShape.key_row, 100);
  const cache::RowsView view{keys.data(), kShape.key_row * sizeof(Half), true};
  ASSERT_TRUE(store_->put(Tensor::kKey, rows, view, kWriter));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::vector<Half> row(keys.begin() + i * kShape.key_row,
                                keys.begin() + (i + 1) * kShape.key_row);
    EXPECT_EQ(read_rows(*store_, Tensor::kKey, rows[i], 1), row) << i;
  }
  const auto newest = store_->stream(0).newest_cells();
  EXPECT_EQ(std::vector<std::uint32_t>(newest.begin(), newest.end()),
            (std::vector<std::uint32_t>{4, 2}));
}

TEST_F(KvStoreTest, RowsOutsideAreAnError) {
  const std::vector<Half> keys(kShape.key_row);
  const cache::RowsView view{keys.data(), 0, true};
  for (const std::int64_t row : {std::int64_t{-1}, std::int64_t{600}, INT64_MAX, INT64_MIN}) {
    EXPECT_FALSE(store_->put(Tensor::kKey, std::vector{row}, view, kWriter)) << row;
  }
}

TEST_F(KvStoreTest, KnowsWhoWroteTheNewestTokens) {
  const std::vector<Half> keys = numbered(kShape.key_row, 1);
  const cache::RowsView view{keys.data(), 0, true};
  EXPECT_FALSE(store_->written_by(0, kWriter));
  ASSERT_TRUE(store_->put(Tensor::kKey, std::vector<std::int64_t>{0}, view, kWriter));
  EXPECT_TRUE(store_->written_by(0, kWriter));
  EXPECT_FALSE(store_->written_by(0, kWriter + 1));
  EXPECT_FALSE(store_->written_by(1, kWriter));
  ASSERT_TRUE(store_->write(Tensor::kKey, 0, store_->row_bytes(Tensor::kKey), keys.data()));
  EXPECT_FALSE(store_->written_by(0, kWriter)) << "restored rows are nobody's newest tokens";
}

// As the host copies a stream: keys, then values.
TEST_F(KvStoreTest, CopiesWholeStreams) {
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const std::vector<Half> rows = numbered(20 * store_->row_bytes(tensor) / sizeof(Half), 1);
    ASSERT_TRUE(store_->write(tensor, 0, rows.size() * sizeof(Half), rows.data()));
  }
  const auto other = make_store();
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const std::size_t stream_bytes = store_->tensor_bytes(tensor) / kShape.n_streams;
    ASSERT_TRUE(store_->copy(tensor, stream_bytes, stream_bytes, *store_, 0));
    ASSERT_TRUE(other->copy(tensor, 0, stream_bytes, *store_, stream_bytes));
  }
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const std::vector<Half> rows = read_rows(*store_, tensor, 0, 25);
    EXPECT_EQ(read_rows(*store_, tensor, 300, 25), rows);
    EXPECT_EQ(read_rows(*other, tensor, 0, 25), rows);
  }
}

TEST_F(KvStoreTest, CopiesParts) {
  const std::vector<Half> values = numbered(90 * kShape.value_row, 5);
  const std::size_t row = store_->row_bytes(Tensor::kValue);
  ASSERT_TRUE(store_->write(Tensor::kValue, 10 * row, 90 * row, values.data()));
  const auto other = make_store();
  ASSERT_TRUE(other->copy(Tensor::kValue, 500 * row, 80 * row, *store_, 15 * row));
  EXPECT_EQ(read_rows(*other, Tensor::kValue, 500, 80), read_rows(*store_, Tensor::kValue, 15, 80));
  EXPECT_EQ(other->live_tokens(), 80u);
}

// The values of a stream whose keys were copied from elsewhere must still be copied.
TEST_F(KvStoreTest, ValuesAloneAreCopied) {
  const std::size_t stream_bytes = store_->tensor_bytes(Tensor::kValue) / kShape.n_streams;
  const std::vector<Half> values = numbered(4 * kShape.value_row, 5);
  ASSERT_TRUE(store_->write(Tensor::kValue, 0, values.size() * sizeof(Half), values.data()));
  ASSERT_TRUE(store_->copy(Tensor::kValue, stream_bytes, stream_bytes, *store_, 0));
  EXPECT_EQ(read_rows(*store_, Tensor::kValue, 300, 4), values);
}

TEST_F(KvStoreTest, ClearForgets) {
  const std::vector<Half> keys = numbered(kShape.key_row, 1);
  const cache::RowsView view{keys.data(), 0, true};
  ASSERT_TRUE(store_->put(Tensor::kKey, std::vector<std::int64_t>{0, 301}, view, kWriter));
  EXPECT_EQ(store_->live_tokens(), 2u);
  store_->clear();
  EXPECT_EQ(store_->live_tokens(), 0u);
  EXPECT_FALSE(store_->written_by(0, kWriter));
}

TEST_F(KvStoreTest, BeyondTheLimitIsAnError) {
  KvStore small(kShape, policy_, std::make_shared<cache::Budget>(100));
  const std::vector<Half> keys = numbered(kShape.key_row, 1);
  const cache::RowsView view{keys.data(), 0, true};
  const Status put = small.put(Tensor::kKey, std::vector<std::int64_t>{0}, view, kWriter);
  ASSERT_FALSE(put);
  EXPECT_EQ(put.error().code, ErrorCode::kOutOfMemory);
}

}  // namespace
}  // namespace zipcache::ggml
