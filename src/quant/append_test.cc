// Tokens that join a block: those that were there keep what they said, the new ones are the nearest
// points of its grids, and grids that keys have left become those of ref/.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <thread>

#include "format/block_join.h"
#include "format/block_params.h"
#include "quant/codec_test_util.h"
#include "ref/quant_ref.h"

namespace zipcache::quant {
namespace {

// Shapes of a block and of what joins it.
struct Join {
  BlockShape block, added;
};

std::vector<Join> joins() {
  std::vector<Join> all;
  const auto add = [&](BlockShape block, std::uint32_t n, std::uint32_t key0,
                       std::uint32_t value0) {
    BlockShape added = block;
    added.n_tokens = n;
    added.key.class0_tokens = key0;
    added.value.class0_tokens = value0;
    all.push_back({block, added});
  };
  for (const std::uint32_t n_tokens : {48u, 64u, 101u}) {
    for (const std::uint32_t n : {1u, 15u, 16u, 17u, 64u}) {
      BlockShape shape = default_shape(n_tokens, 3);
      add(shape, n, n / 5, n / 2);
      add(shape, n, 0, 0);
      add(shape, n, n, n);
      shape.key.bits = {4, 2};
      shape.key.wide_channels = 16;
      add(shape, n, n / 5, n / 2);
      add(shape, n, 0, n);
      std::swap(shape.key.class0_tokens, shape.value.class0_tokens);  // values within keys
      add(shape, n, n / 2, n / 3);
      shape.key.class0_tokens = shape.value.class0_tokens = n_tokens / 2;  // two tiers
      add(shape, n, n / 2, n / 2);
      shape.key.class0_tokens = 0;  // nothing salient
      add(shape, n, 0, n / 2);
      shape.key.n_classes = shape.value.n_classes = 1;
      shape.n_kv_heads = 1;
      add(shape, n, 0, 0);
      shape.value.token_params = TokenParams::kHalf;
      shape.value.group_channels = 16;
      shape.key.granularity = Granularity::kTokenwise;
      shape.key.wide_channels = 0;
      add(shape, n, 0, 0);
    }
  }
  return all;
}

CodecCase case_of(const BlockShape& shape, std::uint64_t seed, float scale) {
  QuantRules rules;
  rules.key.clip = {1.0f, 0.7f};
  CodecCase c = make_case(shape, rules, false, seed);
  for (std::vector<float>* x : {&c.keys, &c.values}) {
    for (float& value : *x) {
      value *= scale;
    }
  }
  return c;
}

// The block `added` joined to `block`.
class Joined {
 public:
  Joined(const Encoded& block, const CodecCase& added, TaskTeam* team = nullptr)
      : layout_(format::joined_shape(block.layout().shape(), added.shape).value()),
        bytes_(layout_.total_bytes(), std::byte{0xcd}) {
    append_tokens(block.layout(), block.bytes().data(), BlockLayout(added.shape), added.rules,
                  added.keys, added.values, added.tiers, layout_, bytes_.data(), team);
  }

  const BlockLayout& layout() const { return layout_; }
  const AlignedVector<std::byte>& bytes() const { return bytes_; }
  std::vector<float> decoded(Tensor t) const {
    std::vector<float> rows(std::size_t{layout_.shape().n_tokens} * layout_.shape().n_kv_heads *
                            layout_.head_dim(t));
    const std::span<float> none;
    decode_block(layout_, bytes_.data(), t == Tensor::kKey ? rows : none,
                 t == Tensor::kKey ? none : rows);
    return rows;
  }

 private:
  BlockLayout layout_;
  AlignedVector<std::byte> bytes_;
};

// (scale, min) of a key channel as stored; `channel` in stored order.
ref::QuantParams channel_grid(const BlockLayout& layout, const std::byte* block, std::uint32_t head,
                              int cls, std::size_t channel) {
  std::vector<float> grid(std::size_t{2} * layout.shape().key_dim);
  format::load_halves(block + layout.channel_scale_min(Tensor::kKey, head, cls), grid.size(),
                      grid.data());
  return {grid[channel], grid[layout.shape().key_dim + channel]};
}

// Calls visit(token, slot of the class, class, element of a row, stored channel, bits) for each
// element of a channelwise K.
template <typename Visit>
void for_each_key(const BlockLayout& layout, const std::byte* block, const Visit& visit) {
  const BlockShape& shape = layout.shape();
  std::vector<std::uint32_t> order(shape.n_tokens);
  std::vector<std::uint16_t> channels(shape.key_dim);
  for (std::uint32_t head = 0; head < shape.n_kv_heads; ++head) {
    format::slot_order(layout, block, head, order.data());
    format::channel_order(layout, block, Tensor::kKey, head, channels.data());
    for (std::uint32_t slot = 0; slot < shape.n_tokens; ++slot) {
      const int cls = slot < layout.class_tokens(Tensor::kKey, 0) ? 0 : 1;
      for (std::uint32_t c = 0; c < shape.key_dim; ++c) {
        const std::uint32_t group =
            c < shape.key.wide_channels ? 0 : layout.n_groups(Tensor::kKey) - 1;
        visit(order[slot], head, cls, std::size_t{head} * shape.key_dim + channels[c], c,
              layout.code_bits(Tensor::kKey, cls, group));
      }
    }
  }
}

TEST(AppendTokens, WhatWasThereStaysAndTheRestIsNearest) {
  std::uint64_t seed = 100;
  for (const Join& join : joins()) {
    SCOPED_TRACE(testing::Message() << "case " << seed << ": " << join.added.n_tokens << " to "
                                    << join.block.n_tokens);
    const Encoded block(case_of(join.block, ++seed, 1.0f));
    const CodecCase added = case_of(join.added, ++seed, 0.1f);  // inside all grids
    const Joined joined(block, added);
    const BlockLayout& layout = joined.layout();
    ASSERT_TRUE(BlockLayout::is_valid(layout.shape()));
    ASSERT_TRUE(format::is_sound(layout, joined.bytes().data()));
    for (const Tensor t : kTensors) {
      const std::vector<float> before = block.decoded(t), after = joined.decoded(t);
      EXPECT_TRUE(std::equal(before.begin(), before.end(), after.begin()));
    }
    // Old tokens keep their tier's classes, new ones have theirs.
    const std::size_t row = std::size_t{join.block.n_kv_heads} * join.block.key_dim;
    const std::vector<float> keys = joined.decoded(Tensor::kKey);
    if (join.block.key.granularity == Granularity::kChannelwise) {
      for_each_key(
          layout, joined.bytes().data(),
          [&](std::uint32_t token, std::uint32_t head, int cls, std::size_t element,
              std::size_t channel, int bits) {
            if (token < join.block.n_tokens) {
              return;
            }
            const float x = added.keys[(token - join.block.n_tokens) * row + element];
            const ref::QuantParams grid =
                channel_grid(layout, joined.bytes().data(), head, cls, channel);
            const double nearest = grid.scale * ref::float_min_code(x, grid, bits) + grid.min;
            ASSERT_NEAR(keys[token * row + element], nearest, 1e-6 + 1e-6 * std::abs(nearest));
          });
    }
    // Values: no further off than a step of their own grid allows.
    const std::vector<float> values = joined.decoded(Tensor::kValue);
    double error = 0, power = 0;
    for (std::size_t i = 0; i < added.values.size(); ++i) {
      const double x = added.values[i];
      const double y = values[std::size_t{join.block.n_tokens} * row + i];
      error += (x - y) * (x - y);
      power += x * x;
    }
    EXPECT_LT(error, 0.25 * power);
  }
}

TEST(AppendTokens, KeysThatLeaveTheirGridsWidenThem) {
  std::uint64_t seed = 500;
  int n_widened = 0;
  for (const Join& join : joins()) {
    if (join.block.key.granularity != Granularity::kChannelwise) {
      continue;
    }
    SCOPED_TRACE(testing::Message() << "case " << seed);
    const Encoded block(case_of(join.block, ++seed, 1.0f));
    const CodecCase added = case_of(join.added, ++seed, 3.0f);
    const Joined joined(block, added);
    const std::vector<float> before = block.decoded(Tensor::kKey),
                             after = joined.decoded(Tensor::kKey);
    const std::size_t row = std::size_t{join.block.n_kv_heads} * join.block.key_dim;
    for_each_key(joined.layout(), joined.bytes().data(),
                 [&](std::uint32_t token, std::uint32_t head, int cls, std::size_t element,
                     std::size_t channel, int bits) {
                   std::vector<double> column;
                   for (std::size_t t = 0; t < join.added.n_tokens; ++t) {
                     column.push_back(added.keys[t * row + element]);
                   }
                   const bool wide = channel < join.block.key.wide_channels;
                   const std::vector<double> range = ref::shrunk_range(
                       column, wide || cls == 0 ? 1.0 : static_cast<double>(0.7f));
                   const ref::QuantParams old =
                       channel_grid(block.layout(), block.bytes().data(), head, cls, channel);
                   const ref::QuantParams grid =
                       channel_grid(joined.layout(), joined.bytes().data(), head, cls, channel);
                   const ref::QuantParams expected = ref::widened_params(old, range, bits);
                   const double reach = expected.scale * (1 << bits);
                   ASSERT_NEAR(grid.scale, expected.scale, 1e-3 * expected.scale);
                   ASSERT_NEAR(grid.min, expected.min, 1e-3 * (std::abs(expected.min) + reach));
                   n_widened += grid.scale != old.scale ? 1 : 0;
                   const double x = token < join.block.n_tokens
                                        ? before[token * row + element]
                                        : added.keys[(token - join.block.n_tokens) * row + element];
                   const double nearest =
                       grid.scale * ref::float_min_code(x, grid, bits) + grid.min;
                   // A value in the middle between two codes may go to either.
                   ASSERT_NEAR(std::abs(after[token * row + element] - x), std::abs(nearest - x),
                               1e-5 * reach);
                 });
  }
  EXPECT_GT(n_widened, 100000);
}

TEST(AppendTokens, NothingNotFiniteComesIn) {
  BlockShape shape = default_shape(64, 2);
  shape.key.bits = {4, 2};
  shape.key.wide_channels = 16;
  BlockShape more = shape;
  more.n_tokens = 16;
  more.key.class0_tokens = 4;
  more.value.class0_tokens = 8;
  const Encoded block(case_of(shape, 1, 1.0f));
  CodecCase added = case_of(more, 2, 1.0f);
  using Limits = std::numeric_limits<float>;
  constexpr float kBad[] = {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), 1e38f};
  for (std::size_t i = 0; i < added.keys.size(); i += 37) {
    added.keys[i] = kBad[i % 4];
    added.values[i] = kBad[(i + 1) % 4];
  }
  const Joined joined(block, added);
  EXPECT_TRUE(format::is_sound(joined.layout(), joined.bytes().data()));
  for (const Tensor t : kTensors) {
    for (const float x : joined.decoded(t)) {
      ASSERT_TRUE(std::isfinite(x));
    }
  }
}

TEST(AppendTokens, ATeamMakesTheSameBytes) {
  const Join join = joins()[3];
  const Encoded block(case_of(join.block, 3, 1.0f));
  const CodecCase added = case_of(join.added, 4, 2.0f);
  TaskTeam team;
  team.start();
  std::thread helper([&] { team.help(); });
  const Joined by_two(block, added, &team);
  team.finish();
  helper.join();
  EXPECT_EQ(Joined(block, added).bytes(), by_two.bytes());
}

TEST(JoinedShape, IsForTokensOfTheSameKindOnly) {
  const BlockShape block = default_shape(64);
  BlockShape added = block;
  added.n_tokens = 16;
  added.key.class0_tokens = 3;
  added.value.class0_tokens = 8;
  const auto joined = format::joined_shape(block, added);
  ASSERT_TRUE(joined.has_value());
  EXPECT_EQ(joined->n_tokens, 80u);
  EXPECT_EQ(joined->key.class0_tokens, 64u / 3 + 3);
  EXPECT_EQ(joined->value.class0_tokens, 40u);

  const auto refuses = [&](auto change_both, auto change_added) {
    BlockShape b = block, a = added;
    change_both(b);
    change_both(a);
    a.n_tokens = added.n_tokens;
    a.key.class0_tokens = added.key.class0_tokens;
    a.value.class0_tokens = added.value.class0_tokens;
    change_added(a);
    return !format::joined_shape(b, a).has_value();
  };
  const auto as_it_is = [](BlockShape&) {};
  EXPECT_FALSE(refuses(as_it_is, as_it_is));
  EXPECT_TRUE(refuses(as_it_is, [](BlockShape& s) { s.key.bits = {4, 2}; }));
  EXPECT_TRUE(refuses(as_it_is, [](BlockShape& s) { s.n_kv_heads = 1; }));
  EXPECT_TRUE(refuses(as_it_is, [](BlockShape& s) { s.key.class0_tokens = 9; }));  // not nested
  EXPECT_TRUE(refuses([](BlockShape& s) { s.key.class0_tokens = 0; }, as_it_is));  // an empty class
  EXPECT_TRUE(refuses([](BlockShape& s) { s.value.class0_tokens = 64; }, as_it_is));
  EXPECT_TRUE(refuses([](BlockShape& s) { s.key.group_tokens = 32; }, as_it_is));
  EXPECT_TRUE(refuses([](BlockShape& s) { s.key.bits = {16, 2}; }, as_it_is));
}

}  // namespace
}  // namespace zipcache::quant
