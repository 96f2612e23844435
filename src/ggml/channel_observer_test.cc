#include "ggml/channel_observer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/half.h"
#include "ggml/kv_store.h"

namespace zipcache::ggml {
namespace {

using cache::Tensor;

// Two KV heads of 16 channels (K and V), four query heads.
constexpr std::uint32_t kRow = 32, kDim = 16;

cache::Query query_of(const std::vector<float>& q) {
  cache::Query query;
  query.q = q.data();
  query.n_heads = 4;
  query.q_head_stride = kDim;
  query.q_row_stride = 4 * kDim;
  query.n_rows = static_cast<std::uint32_t>(q.size() / (4 * kDim));
  return query;
}

TEST(ChannelObserver, KeepsExtremesOfEachChannel) {
  ChannelObserver observer(5, kRow, kRow);
  EXPECT_FALSE(observer.seen());
  std::vector<float> keys(3 * kRow), values(3 * kRow, 2.0f);
  for (std::size_t c = 0; c < kRow; ++c) {
    keys[c] = float(c), keys[kRow + c] = -3.0f, keys[2 * kRow + c] = 1.0f;
  }
  observer.add_rows(Tensor::kKey, 2, {keys.data(), kRow * sizeof(float), false});
  observer.add_rows(Tensor::kKey, 1, {&keys[2 * kRow], kRow * sizeof(float), false});
  std::vector<Half> halves(values.size());
  std::transform(values.begin(), values.end(), halves.begin(), float_to_half);
  halves[kRow + 7] = float_to_half(-0.5f);
  observer.add_rows(Tensor::kValue, 3, {halves.data(), kRow * sizeof(Half), true});
  EXPECT_FALSE(observer.seen());  // heads are not known yet

  std::vector<float> q(2 * 4 * kDim, 0.25f);
  q[4 * kDim + 3 * kDim + 2] = -9.0f;  // row 1, head 3, which reads KV head 1
  observer.add_queries(query_of(q), 2, kDim, kDim);
  const auto seen = observer.seen();
  ASSERT_TRUE(seen);
  EXPECT_EQ(seen->layer, 5u);
  EXPECT_EQ(seen->n_kv_heads, 2u);
  EXPECT_EQ(seen->key_dim, kDim);
  EXPECT_EQ(seen->value_dim, kDim);
  for (std::size_t c = 0; c < kRow; ++c) {
    EXPECT_EQ(seen->key_min[c], -3.0f);
    EXPECT_EQ(seen->key_max[c], std::max(1.0f, float(c)));
    EXPECT_EQ(seen->value_min[c], c == 7 ? -0.5f : 2.0f);
    EXPECT_EQ(seen->value_max[c], 2.0f);
    EXPECT_EQ(seen->query_max[c], c == kDim + 2 ? 9.0f : 0.25f);
  }
}

TEST(ChannelObserver, WhatIsNotFiniteCanBeWritten) {
  ChannelObserver observer(0, kRow, kRow);
  std::vector<float> rows(2 * kRow, 1.0f), q(4 * kDim, NAN);
  rows[0] = NAN, rows[1] = INFINITY, rows[2] = -INFINITY;
  q[0] = -INFINITY;
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    observer.add_rows(tensor, 2, {rows.data(), kRow * sizeof(float), false});
  }
  observer.add_queries(query_of(q), 2, kDim, kDim);
  policy::Calibration calibration;
  calibration.layers.push_back(observer.seen().value());
  EXPECT_EQ(calibration.layers[0].key_max[0], 1.0f);
  EXPECT_EQ(calibration.layers[0].key_max[1], 65504.0f);
  EXPECT_EQ(calibration.layers[0].key_min[2], -65504.0f);
  EXPECT_EQ(calibration.layers[0].query_max[0], 65504.0f);
  EXPECT_EQ(calibration.layers[0].query_max[1], 0.0f);
  const auto read = policy::parse_calibration(policy::calibration_text(calibration));
  ASSERT_TRUE(read) << read.error().message;
  EXPECT_EQ(*read, calibration);
}

TEST(ChannelObserver, AStoreObservesOnlyWhenAskedAndClearingForgetsNothing) {
  policy::Policy fp16;
  fp16.keeps_exact = true;
  KvStore store({.layer = 3, .n_streams = 1, .n_cells = 64, .key_row = kRow, .value_row = kRow},
                std::make_shared<const policy::Policy>(fp16), std::make_shared<cache::Budget>());
  EXPECT_EQ(store.observer(), nullptr);
  store.observe();
  const std::vector<float> rows(kRow, -4.0f), q(4 * kDim, 1.0f);
  const std::vector<std::int64_t> cells{9};
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    store.put(tensor, cells, {rows.data(), kRow * sizeof(float), false}, 1).value();
  }
  store.observer()->add_queries(query_of(q), 2, kDim, kDim);
  store.clear();
  const auto seen = store.observer()->seen();
  ASSERT_TRUE(seen);
  EXPECT_EQ(seen->layer, 3u);
  EXPECT_EQ(seen->key_min, std::vector<float>(kRow, -4.0f));
}

}  // namespace
}  // namespace zipcache::ggml
