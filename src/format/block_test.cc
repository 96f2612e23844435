// Properties of block layouts over many shapes, and what the rest of block.h promises.
#include "format/block.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "base/philox.h"

namespace zipcache::format {
namespace {

TensorFormat random_format(Philox& random, std::uint32_t head_dim, std::uint32_t n_tokens) {
  static constexpr std::array<std::uint8_t, 5> kWidths{2, 3, 4, 8, kExactBits};
  TensorFormat f;
  f.granularity = static_cast<Granularity>(random.below(3));
  f.n_classes = static_cast<std::uint8_t>(1 + random.below(2));
  f.bits = {kWidths[random.below(5)], kWidths[random.below(5)]};
  f.class_factors = f.granularity == Granularity::kChannelSeparable && random.below(2) == 0;
  f.class0_tokens = random.below(3) == 0 ? n_tokens * random.below(2) : random.below(n_tokens + 1);
  if (f.granularity != Granularity::kChannelwise) {
    f.token_params = static_cast<TokenParams>(random.below(2));
    f.slot_shared = f.token_params == TokenParams::kHalf && f.bits[0] != kExactBits &&
                    f.bits[1] != kExactBits && random.below(2) == 0;
    const std::uint32_t group = 16 * (1 + random.below(head_dim / 16));
    f.group_channels =
        static_cast<std::uint16_t>(!f.slot_shared && head_dim % group == 0 ? group : 0);
  }
  return f;
}

BlockShape random_shape(Philox& random) {
  BlockShape s;
  s.n_tokens = 1 + random.below(random.below(2) == 0 ? 40 : 300);
  s.n_kv_heads = 1 + random.below(4);
  s.key_dim = 16 * (1 + random.below(8));
  s.value_dim = 16 * (1 + random.below(8));
  s.key = random_format(random, s.key_dim, s.n_tokens);
  s.value = random_format(random, s.value_dim, s.n_tokens);
  if (s.key.granularity == Granularity::kChannelwise && random.below(2) == 0) {
    s.key.group_tokens = static_cast<std::uint16_t>(16 * (1 + random.below(4)));
  }
  for (TensorFormat* f : {&s.key, &s.value}) {
    f->given_factors = f->granularity == Granularity::kChannelSeparable && random.below(2) == 0;
    f->reordered = random.below(3) == 0;
  }
  if (random.below(4) == 0) {  // evicts
    s.key.n_classes = s.value.n_classes = 2;
    s.key.slot_shared = s.value.slot_shared = false;
    s.key.bits[1] = s.value.bits[1] = kEvictedBits;
    s.value.class0_tokens = s.key.class0_tokens;
  } else if (s.key.n_classes == 1 && s.value.n_classes == 1) {
    s.key.rank = static_cast<std::uint8_t>(random.below(4));
    s.value.rank = static_cast<std::uint8_t>(random.below(4));
    s.key.outliers = static_cast<std::uint16_t>(random.below(std::min(s.n_tokens, 6u) + 1));
    s.value.outliers = static_cast<std::uint16_t>(random.below(6));
  }
  TensorFormat& key = s.key;
  if (key.granularity == Granularity::kChannelwise && s.key_dim > 16 && random.below(2) == 0) {
    key.reordered = false;
    key.rank = 0;
    key.outliers = 0;
    key.wide_channels = static_cast<std::uint16_t>(16 * (1 + random.below(s.key_dim / 16 - 1)));
    key.wide_bits = 8;
    const bool has_codes = BlockLayout::is_valid(s);  // in all classes
    key.wide_channels = has_codes ? key.wide_channels : std::uint16_t{0};
  }
  return s;
}

std::size_t expected_matrix_bytes(int bits, std::size_t lanes, std::size_t inner) {
  return bits == kEvictedBits ? 0
         : bits == kExactBits ? (lanes * inner * 2 + 63) / 64 * 64
                              : matrix_bytes(bits, lanes, inner);
}

// Sections by first byte. Those shared over heads appear once.
using Sections = std::map<std::size_t, std::size_t>;

void add(Sections* sections, std::size_t begin, std::size_t size) {
  if (size > 0) {
    const auto [at, is_new] = sections->emplace(begin, size);
    EXPECT_TRUE(is_new) << "two sections at " << begin;
  }
}

Sections code_sections(const BlockLayout& l) {
  Sections s;
  for (const Tensor t : {Tensor::kKey, Tensor::kValue}) {
    for (std::uint32_t head = 0; head < l.shape().n_kv_heads; ++head) {
      for (int cls = 0; cls < l.tensor(t).n_classes; ++cls) {
        for (std::uint32_t group = 0; group < l.n_groups(t); ++group) {
          EXPECT_EQ(l.codes(t, head, cls, group) % 64, 0u);
          const std::size_t tokens = l.class_tokens(t, cls);
          const std::size_t channels = l.group_channels(t, group);
          const int bits = l.code_bits(t, cls, group);
          EXPECT_EQ(l.codes_size(t, cls, group),
                    t == Tensor::kKey ? expected_matrix_bytes(bits, tokens, channels)
                                      : expected_matrix_bytes(bits, channels, tokens));
          add(&s, l.codes(t, head, cls, group), l.codes_size(t, cls, group));
        }
      }
    }
  }
  return s;
}

Sections param_sections(const BlockLayout& l) {
  Sections s;
  for (const Tensor t : {Tensor::kKey, Tensor::kValue}) {
    const TensorFormat& f = l.tensor(t);
    const std::size_t n = l.param_slots(t);
    for (std::uint32_t head = 0; head < l.shape().n_kv_heads; ++head) {
      if (f.reordered) {
        add(&s, l.channel_order(t, head), 2 * l.head_dim(t));
      }
      if (f.wide_channels > 0) {
        add(&s, l.wide_mask(t, head), l.head_dim(t) / 8);
      }
      add(&s, l.low_rank(t, head), 2 * f.rank * (l.shape().n_tokens + l.head_dim(t)));
      add(&s, l.outliers(t, head), std::size_t{4} * l.outlier_vectors(t) * f.outliers);
      if (f.granularity == Granularity::kChannelwise) {
        for (int cls = 0; cls < f.n_classes; ++cls) {
          const std::uint32_t groups = l.n_token_groups(t, cls);
          EXPECT_EQ(groups > 0, is_code_width(f.bits[cls]) && l.class_tokens(t, cls) > 0);
          for (std::uint32_t group = 0; group < groups; ++group) {
            add(&s, l.channel_scale_min(t, head, cls, group), 4 * l.head_dim(t));
          }
        }
        continue;
      }
      if (n == 0) {
        continue;
      }
      if (f.granularity == Granularity::kChannelSeparable) {
        const int n_sets = l.tensor(t).class_factors ? l.tensor(t).n_classes : 1;
        for (int set = 0; set < n_sets; ++set) {
          add(&s, l.channel_factor(t, head, set), 2 * l.head_dim(t));
        }
      }
      for (std::uint32_t group = 0; group < l.n_groups(t); ++group) {
        if (!f.slot_shared || head == 0) {
          add(&s, l.token_scale_min(t, head, group),
              (f.token_params == TokenParams::kHalf ? 4 : 2) * n);
        } else {
          EXPECT_EQ(l.token_scale_min(t, head, group), l.token_scale_min(t, 0, group));
        }
      }
      if (f.token_params == TokenParams::kByte) {
        add(&s, l.token_base(t, head), 2 * f.n_classes);
      }
    }
  }
  return s;
}

Sections tier_sections(const BlockLayout& l) {
  Sections s;
  for (std::uint32_t head = 0; head < l.shape().n_kv_heads; ++head) {
    for (std::uint32_t plane = 0; plane < l.n_tier_planes(); ++plane) {
      EXPECT_EQ(l.tier_plane(head, plane) % 8, 0u);
      add(&s, l.tier_plane(head, plane), (l.shape().n_tokens + 63) / 64 * 8);
    }
  }
  return s;
}

// Marks every byte of every section and finds overlaps and gaps longer than alignment explains.
void expect_disjoint_cover(const Sections& sections, std::size_t begin, std::size_t end,
                           std::size_t largest_gap) {
  std::size_t at = begin;
  for (const auto& [first, size] : sections) {
    EXPECT_GE(first, at) << "overlap";
    EXPECT_LT(first - std::min(first, at), largest_gap + 1) << "gap before " << first;
    EXPECT_EQ(first % 2, 0u);
    at = first + size;
  }
  EXPECT_LE(at, end);
  EXPECT_LT(end - at, 64u);
}

TEST(BlockLayout, SectionsAreDisjointAndCoverTheBlock) {
  Philox random(11, 0, 0);
  for (int draw = 0; draw < 2000; ++draw) {
    const BlockShape shape = random_shape(random);
    ASSERT_TRUE(BlockLayout::is_valid(shape));
    const BlockLayout l(shape);
    SCOPED_TRACE(::testing::Message() << "draw " << draw);
    expect_disjoint_cover(code_sections(l), 0, l.codes_bytes(), 0);
    const std::size_t tiers = l.codes_bytes() + l.params_bytes();
    expect_disjoint_cover(param_sections(l), l.codes_bytes(), tiers, 63);
    expect_disjoint_cover(tier_sections(l), tiers, l.total_bytes(), 0);
    EXPECT_EQ(l.total_bytes(), tiers + l.masks_bytes());
    EXPECT_EQ(l.total_bytes() % 64, 0u);
    EXPECT_EQ(l.codes_bytes() % 64, 0u);
    EXPECT_EQ(tiers % 64, 0u);
    if (::testing::Test::HasFailure()) {
      break;
    }
  }
}

TEST(BlockLayout, ClassesAndTiersPartitionTheSlots) {
  Philox random(12, 0, 0);
  for (int draw = 0; draw < 500; ++draw) {
    const BlockLayout l(random_shape(random));
    const std::uint32_t n = l.shape().n_tokens;
    std::vector<std::uint32_t> borders{0};
    for (std::uint32_t tier = 0; tier < l.n_tiers(); ++tier) {
      EXPECT_GT(l.tier_tokens(tier), 0u);
      borders.push_back(borders.back() + l.tier_tokens(tier));
    }
    EXPECT_EQ(borders.back(), n);
    for (const Tensor t : {Tensor::kKey, Tensor::kValue}) {
      EXPECT_EQ(l.class_tokens(t, 0) + l.class_tokens(t, 1), n);
      EXPECT_EQ(l.first_slot(t, 1), l.class_tokens(t, 0));
      if (l.tensor(t).n_classes == 1) {
        EXPECT_EQ(l.class_tokens(t, 0), n);
      }
      EXPECT_TRUE(std::count(borders.begin(), borders.end(), l.first_slot(t, 1)) > 0)
          << "a class border is a tier border";
    }
  }
}

// Parameters cost what the method says: 2 * 16 bits per channel and class, and so on.
TEST(BlockLayout, AccountsForItsParts) {
  BlockShape s{256, 3, 64, 64, {}, {}};
  s.key.n_classes = 2;
  s.key.bits = {4, 3};
  s.key.class0_tokens = 96;
  s.value = s.key;
  s.value.granularity = Granularity::kChannelSeparable;
  s.value.bits = {3, 2};
  s.value.class0_tokens = 128;
  const BlockLayout half(s);
  EXPECT_EQ(half.codes_bytes(), 3 * (96 * 64 * 4 + 160 * 64 * 3 + 128 * 64 * 5) / 8u);
  EXPECT_EQ(half.params_bytes(), 3 * (2 * 64 * 4 + 64 * 2 + 256 * 4u));
  EXPECT_EQ(half.masks_bytes(), 3 * 2 * 256 / 8u);
  s.value.token_params = TokenParams::kByte;
  EXPECT_EQ(BlockLayout(s).params_bytes(),
            (3 * (2 * 64 * 4 + 64 * 2 + 256 * 2 + 16u) + 63) / 64 * 64);
}

TEST(BlockLayout, RefusesShapesThatAreNotValid) {
  BlockShape good{8, 2, 64, 64, {}, {}};
  good.value.granularity = Granularity::kChannelSeparable;
  ASSERT_TRUE(BlockLayout::is_valid(good));
  const auto expect_invalid = [&](const char* why, auto change) {
    BlockShape s = good;
    change(s);
    EXPECT_FALSE(BlockLayout::is_valid(s)) << why;
    EXPECT_THROW(BlockLayout{s}, ContractViolation) << why;
  };
  expect_invalid("no tokens", [](auto& s) { s.n_tokens = 0; });
  expect_invalid("too many tokens", [](auto& s) { s.n_tokens = 0xffffffff; });
  expect_invalid("no heads", [](auto& s) { s.n_kv_heads = 0; });
  expect_invalid("too many heads", [](auto& s) { s.n_kv_heads = 0xffffffff; });
  expect_invalid("dim 0", [](auto& s) { s.key_dim = 0; });
  expect_invalid("dim 24", [](auto& s) { s.value_dim = 24; });
  expect_invalid("dim 528", [](auto& s) { s.value_dim = 528; });
  expect_invalid("width 5", [](auto& s) { s.key.bits[0] = 5; });
  expect_invalid("no classes", [](auto& s) { s.key.n_classes = 0; });
  expect_invalid("3 classes", [](auto& s) { s.key.n_classes = 3; });
  expect_invalid("second width", [](auto& s) { s.key.n_classes = 2, s.key.bits[1] = 1; });
  expect_invalid("border", [](auto& s) { s.value.n_classes = 2, s.value.class0_tokens = 9; });
  expect_invalid("group 48 of 64", [](auto& s) { s.value.group_channels = 48; });
  expect_invalid("group 8", [](auto& s) { s.value.group_channels = 8; });
  expect_invalid("channelwise groups", [](auto& s) { s.key.group_channels = 32; });
  expect_invalid("channelwise bytes", [](auto& s) { s.key.token_params = TokenParams::kByte; });
  expect_invalid("channelwise slots", [](auto& s) { s.key.slot_shared = true; });
  expect_invalid("shared groups",
                 [](auto& s) { s.value.slot_shared = true, s.value.group_channels = 32; });
  expect_invalid("shared bytes", [](auto& s) {
    s.value.slot_shared = true, s.value.token_params = TokenParams::kByte;
  });
  expect_invalid("token groups of 8", [](auto& s) { s.key.group_tokens = 8; });
  expect_invalid("token groups of V", [](auto& s) { s.value.group_tokens = 32; });
  expect_invalid("given channelwise factors", [](auto& s) { s.key.given_factors = true; });
  expect_invalid("nothing kept", [](auto& s) { s.key.bits[0] = 0; });
  expect_invalid("evicted keys alone", [](auto& s) { s.key.n_classes = 2, s.key.bits[1] = 0; });
  expect_invalid("evicted apart", [](auto& s) {
    s.key.n_classes = s.value.n_classes = 2;
    s.key.bits[1] = s.value.bits[1] = 0;
    s.key.class0_tokens = 3;
  });
  expect_invalid("shared and exact",
                 [](auto& s) { s.value.slot_shared = true, s.value.bits[0] = kExactBits; });
  expect_invalid("rank and classes", [](auto& s) { s.key.rank = 2, s.value.n_classes = 2; });
  expect_invalid("outliers", [](auto& s) { s.key.outliers = 9; });
  expect_invalid("granularity", [](auto& s) { s.key.granularity = static_cast<Granularity>(3); });
  expect_invalid("params", [](auto& s) { s.value.token_params = static_cast<TokenParams>(2); });

  BlockShape unused = good;
  unused.key.bits[1] = 77;
  unused.key.class0_tokens = 1000;
  EXPECT_TRUE(BlockLayout::is_valid(unused)) << "an unused class doesn't matter";
  EXPECT_EQ(BlockLayout(unused).class_tokens(Tensor::kKey, 0), 8u);
}

// A shape with three tiers: K's border at 3, V's at 5 of 20 tokens.
BlockShape three_tiers() {
  BlockShape s{20, 2, 16, 16, {}, {}};
  s.key.n_classes = s.value.n_classes = 2;
  s.key.class0_tokens = 3;
  s.value.class0_tokens = 5;
  return s;
}

TEST(Tiers, RoundTripAndSlotOrder) {
  const BlockLayout l(three_tiers());
  ASSERT_EQ(l.n_tiers(), 3u);
  ASSERT_EQ(l.n_tier_planes(), 2u);
  std::vector<std::byte> block(l.total_bytes(), std::byte{0xcd});
  Philox random(5, 0, 0);
  for (std::uint32_t head = 0; head < 2; ++head) {
    std::vector<std::uint8_t> tiers(20, 2);
    std::fill_n(tiers.begin(), 3, std::uint8_t{0});
    std::fill_n(tiers.begin() + 3, 2, std::uint8_t{1});
    for (std::uint32_t token = 19; token > 0; --token) {
      std::swap(tiers[token], tiers[random.below(token + 1)]);
    }
    write_tiers(l, block.data(), head, tiers.data());
    std::vector<std::uint8_t> back(20, 0xcd);
    read_tiers(l, block.data(), head, back.data());
    EXPECT_EQ(back, tiers);

    std::vector<std::uint32_t> order(20), want(20);
    slot_order(l, block.data(), head, order.data());
    std::iota(want.begin(), want.end(), 0u);
    std::stable_sort(want.begin(), want.end(), [&](auto a, auto b) { return tiers[a] < tiers[b]; });
    EXPECT_EQ(order, want);
    // Token 13's plane bits, by the rule: bit 5 of byte 1.
    for (std::uint32_t plane = 0; plane < 2; ++plane) {
      const auto byte = std::to_integer<int>(block[l.tier_plane(head, plane) + 1]);
      EXPECT_EQ(byte >> 5 & 1, tiers[13] >> plane & 1);
    }
  }
  const std::vector<std::uint8_t> wrong(20, 0);
  EXPECT_THROW(write_tiers(l, block.data(), 0, wrong.data()), ContractViolation);
}

TEST(Tiers, BordersAtTheEndsMakeNoTier) {
  BlockShape s = three_tiers();
  s.key.class0_tokens = 0;
  s.value.class0_tokens = 20;
  const BlockLayout one(s);
  EXPECT_EQ(one.n_tiers(), 1u);
  EXPECT_EQ(one.masks_bytes(), 0u);
  std::vector<std::byte> block(one.total_bytes());
  std::vector<std::uint32_t> order(20);
  slot_order(one, block.data(), 1, order.data());
  EXPECT_TRUE(std::is_sorted(order.begin(), order.end()));
  s.key.class0_tokens = 5;
  s.value.class0_tokens = 5;
  const BlockLayout two(s);
  EXPECT_EQ(two.n_tiers(), 2u);
  EXPECT_EQ(two.n_tier_planes(), 1u);
}

TEST(ByteScale, FollowsItsFormula) {
  for (int e = 0; e < 256; ++e) {
    const double want = 3.5 * (1 + (e & 15) / 16.0) * std::ldexp(1.0, (e >> 4) - 15);
    EXPECT_EQ(byte_scale(3.5f, static_cast<std::uint8_t>(e)), want) << e;
    EXPECT_EQ(encode_byte_scale(3.5f, byte_scale(3.5f, static_cast<std::uint8_t>(e))), e);
  }
}

TEST(ByteScale, EncodesToNearest) {
  Philox random(8, 0, 0);
  for (int draw = 0; draw < 5000; ++draw) {
    const float base = half_to_float(static_cast<Half>(1 + random.below(0x7bff)));
    const float scale = base * std::ldexp(1.0f + random.below(1u << 20) * 0x1p-20f,
                                          2 - static_cast<int>(random.below(22)));
    const float got = byte_scale(base, encode_byte_scale(base, scale));
    for (int e = 0; e < 256; ++e) {
      const double other = byte_scale(base, static_cast<std::uint8_t>(e));
      ASSERT_LE(std::abs(got - scale), std::abs(other - scale) + 1e-6 * scale)
          << base << " " << scale << " " << e;
    }
  }
  EXPECT_EQ(encode_byte_scale(1, 0), 0);
  EXPECT_EQ(encode_byte_scale(1, -3), 0);
  EXPECT_EQ(encode_byte_scale(1, 1e30f), 255);
  EXPECT_EQ(encode_byte_scale(0x1p-24f, 3e38f), 255);
}

TEST(ByteScale, BaseMakesTheLargestScaleRepresentable) {
  for (const float largest : {1e-4f, 0.37f, 1.0f, 12.5f, 4321.0f}) {
    const float base = byte_scale_base(largest);
    EXPECT_EQ(base, round_to_half(base)) << "bases are stored as fp16";
    EXPECT_NEAR(byte_scale(base, 255), largest, largest * 0x1p-10f);
    EXPECT_EQ(encode_byte_scale(base, largest), 255);
  }
  EXPECT_EQ(byte_scale_base(0), 1);
  EXPECT_EQ(byte_scale_base(1e-20f), 1);
  EXPECT_EQ(byte_scale_base(1e20f), 65504);
}

TEST(ByteScale, MinSpansTheCodes) {
  EXPECT_EQ(byte_min(2, 0, 4), 0);
  EXPECT_EQ(byte_min(2, 255, 4), -30);
  EXPECT_EQ(byte_min(2, 255, 3), -14);
  EXPECT_EQ(byte_min(0.5f, 85, 2), -0.5f);
}

TEST(Soundness, FindsForeignTiersAndParameters) {
  BlockShape s = three_tiers();
  s.value.granularity = Granularity::kChannelSeparable;
  s.value.token_params = TokenParams::kByte;
  const BlockLayout l(s);
  std::vector<std::byte> block(l.total_bytes());
  EXPECT_FALSE(is_sound(l, block.data())) << "no tier counts";
  std::vector<std::uint8_t> tiers(20, 2);
  tiers[1] = tiers[7] = tiers[19] = 0;
  tiers[4] = tiers[8] = 1;
  write_tiers(l, block.data(), 0, tiers.data());
  write_tiers(l, block.data(), 1, tiers.data());
  EXPECT_TRUE(is_sound(l, block.data()));
  for (const std::size_t offset :
       {l.channel_scale_min(Tensor::kKey, 1, 1) + 4 * 16 - 1,
        l.channel_factor(Tensor::kValue, 0, 0) + 1, l.token_base(Tensor::kValue, 1) + 3}) {
    std::vector<std::byte> bad = block;
    bad[offset] = std::byte{0x7c};  // infinity
    EXPECT_FALSE(is_sound(l, bad.data())) << offset;
  }
  std::vector<std::byte> any_byte = block;
  any_byte[l.token_scale_min(Tensor::kValue, 0, 0)] = std::byte{0xff};
  EXPECT_TRUE(is_sound(l, any_byte.data()));
  block[l.tier_plane(1, 0)] ^= std::byte{1};
  EXPECT_FALSE(is_sound(l, block.data()));
  {
    BlockShape places{20, 1, 16, 16, {}, {}};
    places.value.reordered = true;
    places.key.outliers = 2;
    const BlockLayout p(places);
    std::vector<std::byte> bytes(p.total_bytes());
    EXPECT_FALSE(is_sound(p, bytes.data())) << "all channels in place 0";
    for (std::size_t c = 0; c < 16; ++c) {
      bytes[p.channel_order(Tensor::kValue, 0) + 2 * c] = std::byte(15 - c);
    }
    EXPECT_TRUE(is_sound(p, bytes.data()));
    bytes[p.outliers(Tensor::kKey, 0) + 2] = std::byte{20};
    EXPECT_FALSE(is_sound(p, bytes.data())) << "there is no token 20";
  }
  {
    BlockShape wide{20, 1, 32, 16, {}, {}};
    wide.key.wide_channels = 16;
    const BlockLayout w(wide);
    std::vector<std::byte> bytes(w.total_bytes());
    EXPECT_FALSE(is_sound(w, bytes.data())) << "no channel is wide";
    bytes[w.wide_mask(Tensor::kKey, 0)] = bytes[w.wide_mask(Tensor::kKey, 0) + 2] = std::byte{0xff};
    EXPECT_TRUE(is_sound(w, bytes.data()));
    std::vector<std::uint16_t> order(32);
    channel_order(w, bytes.data(), Tensor::kKey, 0, order.data());
    EXPECT_EQ(order[7], 7u);
    EXPECT_EQ(order[8], 16u);
    EXPECT_EQ(order[16], 8u);
    EXPECT_EQ(order[31], 31u);
  }
  std::vector<std::uint32_t> order(20);
  EXPECT_THROW(slot_order(l, block.data(), 1, order.data()), ContractViolation);
}

}  // namespace
}  // namespace zipcache::format
