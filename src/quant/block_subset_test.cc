// A smaller block of some tokens says of each of them exactly what the whole block said.
#include "format/block_subset.h"

#include <gtest/gtest.h>

#include "quant/codec_test_util.h"

namespace zipcache::quant {
namespace {

std::vector<float> decode(const BlockLayout& layout, const std::byte* block, Tensor t) {
  std::vector<float> rows(std::size_t{layout.shape().n_tokens} * layout.shape().n_kv_heads *
                          layout.head_dim(t));
  const std::span<float> none;
  decode_block(layout, block, t == Tensor::kKey ? rows : none, t == Tensor::kKey ? none : rows);
  return rows;
}

// True when there is a smaller block.
bool expect_same_rows(const Encoded& whole, const std::vector<bool>& kept) {
  const BlockLayout& layout = whole.layout();
  const auto shape = format::subset_shape(layout, whole.bytes().data(), kept);
  if (!shape) {
    return false;
  }
  EXPECT_TRUE(BlockLayout::is_valid(*shape));
  EXPECT_LT(shape->n_tokens, layout.shape().n_tokens);
  const BlockLayout smaller(*shape);
  AlignedVector<std::byte> bytes(smaller.total_bytes(), std::byte{0xcd});
  format::copy_subset(layout, whole.bytes().data(), kept, smaller, bytes.data());
  EXPECT_TRUE(format::is_sound(smaller, bytes.data()));
  for (const Tensor t : kTensors) {
    const std::vector<float> old_rows = whole.decoded(t);
    const std::vector<float> new_rows = decode(smaller, bytes.data(), t);
    const std::size_t width = std::size_t{layout.shape().n_kv_heads} * layout.head_dim(t);
    auto next = new_rows.begin();
    for (std::size_t token = 0; token < kept.size(); ++token) {
      if (kept[token]) {
        const auto row = old_rows.begin() + static_cast<std::ptrdiff_t>(token * width);
        EXPECT_TRUE(std::equal(row, row + static_cast<std::ptrdiff_t>(width), next))
            << "token " << token << " of " << kept.size();
        next += static_cast<std::ptrdiff_t>(width);
      }
    }
  }
  return true;
}

TensorFormat with(Granularity granularity, TokenParams params, std::uint16_t group,
                  std::uint8_t n_classes, std::array<std::uint8_t, 2> bits,
                  std::uint32_t class0_tokens) {
  TensorFormat f;
  f.granularity = granularity;
  f.token_params = params;
  f.group_channels = group;
  f.n_classes = n_classes;
  f.bits = bits;
  f.class0_tokens = class0_tokens;
  return f;
}

std::vector<BlockShape> shapes() {
  std::vector<BlockShape> all;
  for (const std::uint32_t n : {2u, 31u, 64u, 100u}) {
    all.push_back(default_shape(n, 3));
    all.back().key.wide_channels = 16;
    all.push_back(default_shape(n, 3));
    BlockShape s = default_shape(n, 1);
    s.key = with(Granularity::kTokenwise, TokenParams::kByte, 0, 2, {8, 2}, n);
    s.value = with(Granularity::kTokenwise, TokenParams::kHalf, 16, 2, {4, 3}, n / 2);
    all.push_back(s);
    s.n_kv_heads = 2;
    s.key = with(Granularity::kChannelwise, TokenParams::kHalf, 0, 2, {4, 2}, n / 2);
    s.value = with(Granularity::kChannelSeparable, TokenParams::kHalf, 16, 2, {2, 2}, n / 2);
    s.value.class_factors = true;
    all.push_back(s);
    s.key.n_classes = s.value.n_classes = 1;
    all.push_back(s);
  }
  return all;
}

TEST(BlockSubset, KeptTokensStayAsTheyAre) {
  Philox random(21, 0, 0);
  std::uint64_t seed = 0;
  int smaller = 0;
  for (const BlockShape& shape : shapes()) {
    const CodecCase c = make_case(shape, {}, false, ++seed);
    const Encoded whole(c);
    for (const std::uint32_t one_in : {2u, 3u, 10u, 1000u}) {
      SCOPED_TRACE(testing::Message() << "shape " << seed << ", one in " << one_in);
      std::vector<bool> kept(shape.n_tokens);
      kept[random.below(shape.n_tokens)] = true;
      for (std::size_t token = 0; token < kept.size(); ++token) {
        kept[token] = kept[token] || random.below(one_in) == 0;
      }
      smaller += expect_same_rows(whole, kept) ? 1 : 0;
    }
  }
  EXPECT_GT(smaller, 50);
}

TEST(BlockSubset, CostsWhatItHolds) {
  const BlockShape shape = default_shape(512, 3, 64);
  const Encoded whole(make_case(shape, {}, false, 5));
  std::vector<bool> kept(512);
  for (std::size_t token = 0; token < 128; ++token) {
    kept[4 * token] = true;
  }
  const auto smaller = format::subset_shape(whole.layout(), whole.bytes().data(), kept);
  ASSERT_TRUE(smaller.has_value());
  EXPECT_LT(smaller->n_tokens, 170u);  // 128, and fillers of heads that keep fewer of a tier
}

TEST(BlockSubset, AllOrSharedSlotsGiveNothing) {
  const Encoded whole(make_case(default_shape(64), {}, false, 6));
  const std::vector<bool> all(64, true);
  EXPECT_FALSE(format::subset_shape(whole.layout(), whole.bytes().data(), all).has_value());

  BlockShape shared = default_shape(64);
  shared.value.token_params = TokenParams::kHalf;
  shared.value.slot_shared = true;
  const Encoded published(make_case(shared, {}, false, 7));
  std::vector<bool> some(64);
  some[3] = true;
  EXPECT_FALSE(
      format::subset_shape(published.layout(), published.bytes().data(), some).has_value());
}

}  // namespace
}  // namespace zipcache::quant
