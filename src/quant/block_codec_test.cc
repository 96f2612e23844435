// What block_codec.h promises about blocks as a whole: the specification's numbers, error bounds,
// unusual inputs, order, replacement of keys, and that the bytes are always the same.
#include "quant/block_codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/half.h"
#include "quant/codec_test_util.h"

namespace zipcache::quant {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

BlockShape one_head(std::uint32_t n_tokens, TensorFormat key, TensorFormat value) {
  return {n_tokens, 1, 16, 16, key, value};
}

TensorFormat uniform(Granularity granularity, std::uint8_t bits,
                     TokenParams params = TokenParams::kHalf) {
  TensorFormat f;
  f.granularity = granularity;
  f.token_params = params;
  f.bits = {bits, bits};
  return f;
}

// Rows of up to 16 channels; the other channels are 0.
std::vector<float> widen(const std::vector<std::vector<float>>& rows) {
  std::vector<float> out(rows.size() * 16);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    std::copy(rows[row].begin(), rows[row].end(), out.begin() + static_cast<long>(row * 16));
  }
  return out;
}

CodecCase small_case(const BlockShape& shape, const std::vector<std::vector<float>>& keys,
                     const std::vector<std::vector<float>>& values) {
  return {shape, {}, widen(keys), widen(values), {}};
}

std::vector<int> first_codes(const Encoded& e, Tensor t, std::size_t rows, std::size_t columns) {
  const auto codes = e.codes(t, 0, 0);
  std::vector<int> out;
  for (std::size_t row = 0; row < rows; ++row) {
    out.insert(out.end(), codes.begin() + static_cast<long>(row * 16),
               codes.begin() + static_cast<long>(row * 16 + columns));
  }
  return out;
}

const std::vector<std::vector<float>> kKeyColumn{{8}, {-6}, {2}};
const std::vector<std::vector<float>> kValueRows{
    {.5f, -2, 8, .1f}, {1, -1, -6, .4f}, {-.5f, 0, 2, -.2f}};

TEST(BlockCodec, GoldenOfTheSpecification) {
  CodecCase c = small_case(one_head(3, uniform(Granularity::kChannelwise, 2),
                                    uniform(Granularity::kChannelSeparable, 2)),
                           kKeyColumn, kValueRows);
  const Encoded floats(c);
  EXPECT_EQ(first_codes(floats, Tensor::kKey, 3, 1), (std::vector<int>{3, 0, 2}));
  EXPECT_EQ(first_codes(floats, Tensor::kValue, 3, 4),
            (std::vector<int>{1, 0, 3, 1, 3, 1, 0, 3, 0, 1, 3, 0}));
  const std::vector<float> want_keys{8, -6, 3.3333f};
  const std::vector<std::vector<float>> want_values{
      {0, -2, 8, 0}, {1, -1.528595f, -6, .632456f}, {-.5f, -.138071f, 2, -.316228f}};
  for (std::size_t row = 0; row < 3; ++row) {
    EXPECT_NEAR(floats.decoded(Tensor::kKey)[row * 16], want_keys[row], 0.01);
    for (std::size_t channel = 0; channel < 4; ++channel) {
      EXPECT_NEAR(floats.decoded(Tensor::kValue)[row * 16 + channel], want_values[row][channel],
                  0.01);
    }
  }

  c.rules.key.rounding = Rounding::kIntegerOffset;
  const Encoded integers(c);
  EXPECT_EQ(first_codes(integers, Tensor::kKey, 3, 1), (std::vector<int>{3, 0, 1}));
  const auto keys = integers.decoded(Tensor::kKey);
  EXPECT_NEAR(keys[0], 9.3333, 0.01);
  EXPECT_NEAR(keys[16], -4.6667, 0.01);
  EXPECT_NEAR(keys[32], 0.0, 0.01);

  CodecCase tokens = small_case(
      one_head(3, uniform(Granularity::kTokenwise, 2), uniform(Granularity::kTokenwise, 2)),
      kKeyColumn, kValueRows);
  EXPECT_EQ(first_codes(Encoded(tokens), Tensor::kValue, 1, 4), (std::vector<int>{1, 0, 3, 1}));
}

// Inside the span of the codes the error is at most half a step, outside at most the distance to
// it. The span itself is checked against the formulas by the reference test.
TEST(BlockCodec, ErrorIsHalfAStepPlusClamping) {
  CodecCase c = make_case(default_shape(200, 3, 64), {}, false, 77);
  c.shape.value.token_params = TokenParams::kHalf;
  c.rules.key.clip = c.rules.value.clip = {1.0f, 0.8f};
  const Encoded e(c);
  const BlockLayout& l = e.layout();
  const auto keys = e.decoded(Tensor::kKey), values = e.decoded(Tensor::kValue);
  std::size_t clamped = 0;
  for (std::uint32_t head = 0; head < 3; ++head) {
    const auto order = order_of(c, head);
    const auto check = [&](float x, float got, double low, double step, double levels) {
      const double high = low + step * levels;
      const double outside = std::max({0.0, low - x, x - high});
      clamped += outside > step / 2;
      ASSERT_LE(std::abs(got - x), std::max(step / 2, outside) + 1e-5 * (std::abs(x) + 1))
          << x << " in " << low << ".." << high;
    };
    for (std::uint32_t slot = 0; slot < 200; ++slot) {
      for (std::size_t channel = 0; channel < 64; ++channel) {
        const std::size_t at = (order[slot] * 3 + head) * 64 + channel;
        const int key_class = slot >= l.first_slot(Tensor::kKey, 1);
        const std::size_t key_params = l.channel_scale_min(Tensor::kKey, head, key_class);
        check(c.keys[at], keys[at], e.value(key_params, 64 + channel), e.value(key_params, channel),
              key_class == 0 ? 15 : 7);
        const int value_class = slot >= l.first_slot(Tensor::kValue, 1);
        const double factor = e.value(l.channel_factor(Tensor::kValue, head, 0), channel);
        const std::size_t token_params = l.token_scale_min(Tensor::kValue, head, 0);
        check(c.values[at], values[at], factor * e.value(token_params, 200 + slot),
              factor * e.value(token_params, slot), value_class == 0 ? 7 : 3);
      }
    }
  }
  EXPECT_GT(clamped, 100u) << "clipping clamps";
}

// A code width that can hold the numbers of a grid gives them back exactly.
TEST(BlockCodec, NumbersOnTheGridComeBackExactly) {
  for (const int bits : {2, 3, 4, 8}) {
    const auto width = static_cast<std::uint8_t>(bits);
    CodecCase c = small_case(one_head(40, uniform(Granularity::kChannelwise, width),
                                      uniform(Granularity::kTokenwise, width)),
                             {}, {});
    Philox random(bits, 0, 0);
    for (auto* x : {&c.keys, &c.values}) {
      x->resize(40 * 16);
      for (float& value : *x) {
        value = static_cast<float>(random.below(1u << bits)) * 0.25f - 2.0f;
      }
    }
    for (std::size_t at = 0; at < 16; ++at) {  // every set spans all levels
      for (auto* x : {&c.keys, &c.values}) {
        (*x)[at] = -2.0f;
        (*x)[16 + at] = -2.0f + 0.25f * static_cast<float>((1 << bits) - 1);
      }
    }
    for (std::size_t row = 0; row < 40; ++row) {
      c.values[row * 16] = -2.0f;
      c.values[row * 16 + 1] = -2.0f + 0.25f * static_cast<float>((1 << bits) - 1);
    }
    const Encoded e(c);
    EXPECT_EQ(e.decoded(Tensor::kKey), c.keys) << bits;
    EXPECT_EQ(e.decoded(Tensor::kValue), c.values) << bits;
  }
}

TEST(BlockCodec, ConstantsAndZeros) {
  // fp16 holds 40010 as 40000: the code stays 0 although the step of 1 would allow a better one.
  for (const float constant : {0.0f, 3.25f, -7.0f, 40010.0f}) {
    const std::vector<std::vector<float>> rows(5, std::vector<float>(16, constant));
    for (const Rounding rounding : {Rounding::kFloatMin, Rounding::kIntegerOffset}) {
      CodecCase c = small_case(
          one_head(5, uniform(Granularity::kChannelwise, 4), uniform(Granularity::kTokenwise, 2)),
          rows, rows);
      c.rules.key.rounding = c.rules.value.rounding = rounding;
      const Encoded e(c);
      for (const Tensor t : kTensors) {
        EXPECT_EQ(e.codes(t, 0, 0), std::vector<std::uint8_t>(5 * 16, 0)) << constant;
        EXPECT_EQ(e.decoded(t), std::vector<float>(5 * 16, round_to_half(constant)));
      }
      EXPECT_EQ(e.value(e.layout().channel_scale_min(Tensor::kKey, 0, 0), 0), 1.0);
    }
  }
  CodecCase zeros = make_case(default_shape(9), {}, true, 1);
  std::fill(zeros.values.begin(), zeros.values.end(), -0.0f);
  const Encoded e(zeros);
  for (const float value : e.decoded(Tensor::kValue)) {
    EXPECT_EQ(value, 0.0f);
  }
  EXPECT_EQ(e.value(e.layout().channel_factor(Tensor::kValue, 0, 0), 0), 1.0);
}

TEST(BlockCodec, ARangeTooSmallForFp16IsOneValue) {
  std::vector<std::vector<float>> rows(4, std::vector<float>(16, 0.5f));
  rows[2][0] = 0.5f + 0x1p-24f;
  const Encoded e(small_case(
      one_head(4, uniform(Granularity::kChannelwise, 2), uniform(Granularity::kTokenwise, 2)), rows,
      rows));
  EXPECT_EQ(e.decoded(Tensor::kKey), std::vector<float>(4 * 16, 0.5f));
  EXPECT_EQ(e.decoded(Tensor::kValue), std::vector<float>(4 * 16, 0.5f));
}

// NaN counts as 0 and an infinity as the largest half: the same bytes as with those numbers.
TEST(BlockCodec, NonFiniteInputs) {
  for (const BlockShape& shape :
       {default_shape(21), one_head(21, uniform(Granularity::kTokenwise, 4),
                                    uniform(Granularity::kTokenwise, 2, TokenParams::kByte))}) {
    CodecCase dirty = make_case(shape, {}, true, 5), clean = dirty;
    const float kinds[] = {kNan, -kNan, kInfinity, -kInfinity};
    const float stand_ins[] = {0, 0, 65504, -65504};
    for (std::size_t at = 0; at < dirty.keys.size(); at += 29) {
      dirty.keys[at] = kinds[at % 4];
      clean.keys[at] = stand_ins[at % 4];
    }
    for (std::size_t at = 3; at < dirty.values.size(); at += 31) {
      dirty.values[at] = kinds[at % 4];
      clean.values[at] = stand_ins[at % 4];
    }
    const Encoded e(dirty);
    EXPECT_EQ(e.bytes(), Encoded(clean).bytes());
    EXPECT_TRUE(format::is_sound(e.layout(), e.bytes().data()));
    for (const Tensor t : kTensors) {
      for (const float value : e.decoded(t)) {
        ASSERT_TRUE(std::isfinite(value));
      }
    }
  }
}

TEST(BlockCodec, ValuesBeyondFp16Saturate) {
  for (const float huge : {7e4f, 1e6f, 1e20f, std::numeric_limits<float>::max()}) {
    for (const Rounding rounding : {Rounding::kFloatMin, Rounding::kIntegerOffset}) {
      for (const TokenParams params : {TokenParams::kHalf, TokenParams::kByte}) {
        CodecCase c = make_case(default_shape(21), {}, true, 6);
        c.shape.value.token_params = params;
        c.rules.key.rounding = c.rules.value.rounding = rounding;
        c.rules.key.clip = c.rules.value.clip = {0.9f, 0.7f};
        c.keys[5] = c.values[7] = huge;
        c.keys[100] = c.values[90] = -huge;
        const Encoded e(c);
        EXPECT_TRUE(format::is_sound(e.layout(), e.bytes().data())) << huge;
        for (const Tensor t : kTensors) {
          for (const float value : e.decoded(t)) {
            ASSERT_TRUE(std::isfinite(value)) << huge;
          }
        }
      }
    }
  }
  const Encoded low(small_case(
      one_head(2, uniform(Granularity::kChannelwise, 8), uniform(Granularity::kTokenwise, 8)),
      {{-1e5f}, {-1e5f}}, {{1}, {2}}));
  EXPECT_EQ(low.decoded(Tensor::kKey)[0], -65504.0f);
}

// Channel factors keep one giant channel from flattening the token's others.
TEST(BlockCodec, AGiantChannelIsSeparated) {
  for (const TokenParams params : {TokenParams::kHalf, TokenParams::kByte}) {
    CodecCase c = make_case(one_head(32, uniform(Granularity::kChannelwise, 4),
                                     uniform(Granularity::kChannelSeparable, 4, params)),
                            {}, true, 9);
    double error = 0, plain_error = 0;
    for (std::size_t at = 0; at < c.values.size(); ++at) {
      c.values[at] *= at % 16 == 3 ? 64.0f : 1.0f;
    }
    CodecCase plain = c;
    plain.shape.value.granularity = Granularity::kTokenwise;
    const auto separated = Encoded(c).decoded(Tensor::kValue);
    const auto flattened = Encoded(plain).decoded(Tensor::kValue);
    for (std::size_t at = 0; at < c.values.size(); ++at) {
      if (at % 16 != 3) {
        error += std::abs(separated[at] - c.values[at]);
        plain_error += std::abs(flattened[at] - c.values[at]);
      }
    }
    EXPECT_LT(3 * error, plain_error);
  }
}

// Reorders tokens, their tiers with them; new token t was token order[t].
CodecCase permuted(const CodecCase& c, const std::vector<std::uint32_t>& order) {
  CodecCase out = c;
  const std::size_t n = c.shape.n_tokens, heads = c.shape.n_kv_heads;
  for (std::size_t token = 0; token < n; ++token) {
    const auto move = [&](const std::vector<float>& from, std::size_t row, std::vector<float>* to) {
      std::copy_n(&from[order[token] * row], row, &(*to)[token * row]);
    };
    move(c.keys, heads * c.shape.key_dim, &out.keys);
    move(c.values, heads * c.shape.value_dim, &out.values);
    for (std::size_t head = 0; head < heads; ++head) {
      out.tiers[head * n + token] = c.tiers[head * n + order[token]];
    }
  }
  return out;
}

// The same codes under a scale that gives x . y = x . x, as near as scales are stored.
TEST(BlockCodec, KeptLengthsStretchScalesAlone) {
  BlockShape shape = default_shape(64);
  for (const TokenParams params : {TokenParams::kByte, TokenParams::kHalf}) {
    shape.value.token_params = params;
    CodecCase c = make_case(shape, {}, false, 7);
    c.rules.value.clip = {0.8f, 0.6f};
    const Encoded plain(c);
    c.rules.value.keep_length = true;
    const Encoded kept(c);
    const BlockLayout& l = plain.layout();
    const std::vector<float> before = plain.decoded(Tensor::kValue);
    const std::vector<float> after = kept.decoded(Tensor::kValue);
    int n_stretched = 0;
    for (std::size_t row = 0; row < before.size(); row += l.shape().value_dim) {
      double xx = 0, xy = 0, xz = 0;
      for (std::size_t at = row; at < row + l.shape().value_dim; ++at) {
        xx += double(c.values[at]) * c.values[at];
        xy += double(c.values[at]) * before[at];
        xz += double(c.values[at]) * after[at];
      }
      const double ratio = xx / xy;
      if (ratio < 0.5 || ratio > 2) {
        EXPECT_EQ(xy, xz);
        continue;
      }
      // A byte's scale is a sixteenth of an octave from the next; the widest can't grow.
      const double step = params == TokenParams::kByte ? 1.0 / 32 : 1.0 / 1024;
      n_stretched += std::abs(xz / xx - 1) <= step + 1e-4 ? 1 : 0;
    }
    const auto n_rows = static_cast<int>(before.size() / l.shape().value_dim);
    EXPECT_GT(n_stretched, n_rows * 8 / 10);
    for (int cls = 0; cls < 2; ++cls) {
      for (std::uint32_t head = 0; head < l.shape().n_kv_heads; ++head) {
        EXPECT_EQ(plain.codes(Tensor::kValue, head, cls), kept.codes(Tensor::kValue, head, cls));
      }
    }
  }
}

TEST(BlockCodec, WideChannelsAreThoseThatErrMost) {
  BlockShape shape = default_shape(48, 1, 32);
  shape.key.wide_channels = 16;
  shape.key.bits = {2, 2};
  CodecCase c = make_case(shape, {}, false, 3);
  std::vector<float> weights(32, 1.0f);
  for (std::size_t channel = 0; channel < 32; channel += 2) {
    weights[channel] = 1e6f;
  }
  c.rules.key.channel_weights = weights;
  const Encoded e(c);
  std::vector<std::uint16_t> order(32);
  format::channel_order(e.layout(), e.bytes().data(), Tensor::kKey, 0, order.data());
  for (std::size_t place = 0; place < 32; ++place) {
    EXPECT_EQ(order[place], place < 16 ? 2 * place : 2 * (place - 16) + 1);
  }
}

TEST(BlockCodec, PermutingTokensPermutesTheResult) {
  for (const Granularity granularity :
       {Granularity::kChannelSeparable, Granularity::kTokenwise, Granularity::kChannelwise}) {
    BlockShape shape = default_shape(50, 3, 48);
    shape.value.granularity = granularity;
    shape.value.token_params = TokenParams::kHalf;
    const CodecCase c = make_case(shape, {}, false, 13);
    std::vector<std::uint32_t> order(50);
    for (std::uint32_t token = 0; token < 50; ++token) {
      order[token] = (token * 17 + 3) % 50;
    }
    CodecCase direct = c;
    direct.keys = Encoded(c).decoded(Tensor::kKey);
    direct.values = Encoded(c).decoded(Tensor::kValue);
    const CodecCase want = permuted(direct, order);
    const Encoded got(permuted(c, order));
    EXPECT_EQ(got.decoded(Tensor::kKey), want.keys);
    EXPECT_EQ(got.decoded(Tensor::kValue), want.values);
  }
}

TEST(BlockCodec, ReplaceKeysLeavesTheRestAlone) {
  QuantRules rules;
  rules.key.clip = {0.9f, 0.8f};
  const CodecCase first = make_case(default_shape(45, 3, 32), rules, false, 21);
  CodecCase second = first;
  second.keys = lifelike_values(first.keys.size(), 32, 99);
  Encoded e(first);
  const Encoded want(second);
  ASSERT_NE(e.bytes(), want.bytes());
  replace_keys(e.layout(), first.rules, second.keys, e.bytes().data());
  EXPECT_EQ(e.bytes(), want.bytes());
  EXPECT_EQ(e.decoded(Tensor::kValue), Encoded(first).decoded(Tensor::kValue));
}

TEST(BlockCodec, RefusesWrongSizes) {
  CodecCase c = make_case(default_shape(12), {}, true, 2);
  const BlockLayout l(c.shape);
  AlignedVector<std::byte> block(l.total_bytes());
  const std::span<const float> keys(c.keys), values(c.values);
  const auto encode = [&](auto k, auto v, std::span<const std::uint8_t> t) {
    encode_block(l, c.rules, k, v, t, block.data());
  };
  EXPECT_THROW(encode(keys.first(5), values, c.tiers), ContractViolation);
  EXPECT_THROW(encode(keys, values.first(5), c.tiers), ContractViolation);
  EXPECT_THROW(encode(keys, values, {}), ContractViolation) << "three tiers need tiers";
  const std::vector<std::uint8_t> wrong_counts(c.tiers.size(), 0);
  EXPECT_THROW(encode(keys, values, wrong_counts), ContractViolation);
  std::vector<float> small(5);
  EXPECT_THROW(decode_block(l, block.data(), small, {}), ContractViolation);
}

std::uint64_t fnv1a(std::uint64_t hash, const AlignedVector<std::byte>& bytes) {
  for (const std::byte b : bytes) {
    hash = (hash ^ std::to_integer<std::uint64_t>(b)) * 0x100000001b3u;
  }
  return hash;
}

// The bytes are part of the contract: the same on every machine, compiler and optimisation level.
// A change of the hash is a change of the format or of the arithmetic, and needs to be meant.
TEST(BlockCodec, BytesAreTheSameEverywhere) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const Granularity granularity :
       {Granularity::kChannelSeparable, Granularity::kTokenwise, Granularity::kChannelwise}) {
    for (const Rounding rounding : {Rounding::kFloatMin, Rounding::kIntegerOffset}) {
      for (const bool bytes : {false, true}) {
        BlockShape shape = default_shape(73, 3, 48);
        shape.value.granularity = granularity;
        const bool is_byte = bytes && granularity != Granularity::kChannelwise;
        shape.value.token_params = is_byte ? TokenParams::kByte : TokenParams::kHalf;
        QuantRules rules;
        rules.key.rounding = rules.value.rounding = rounding;
        rules.value.clip = {1.0f, 0.75f};
        const CodecCase c = make_case(shape, rules, false, 31);
        const Encoded once(c), again(c);
        EXPECT_EQ(once.bytes(), again.bytes());
        hash = fnv1a(hash, once.bytes());
      }
    }
  }
  EXPECT_EQ(hash, 0x742af678da65a979u) << std::hex << "0x" << hash;
}

}  // namespace
}  // namespace zipcache::quant
