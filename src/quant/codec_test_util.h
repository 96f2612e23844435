// A block codec case and what the tests look at: the inputs, the encoded bytes, and the block's
// codes and parameters read back one by one.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "base/aligned.h"
#include "base/half.h"
#include "base/philox.h"
#include "quant/block_codec.h"

namespace zipcache::quant {

using format::BlockLayout;
using format::BlockShape;
using format::Granularity;
using format::Tensor;
using format::TensorFormat;
using format::TokenParams;

inline constexpr Tensor kTensors[] = {Tensor::kKey, Tensor::kValue};

struct CodecCase {
  BlockShape shape;
  QuantRules rules;
  std::vector<float> keys, values;
  std::vector<std::uint8_t> tiers;  // [n_kv_heads][n_tokens]
  // What rules' spans point to; shared, so that a copy's spans stay good.
  std::shared_ptr<std::vector<float>> given = nullptr;          // of both tensors
  std::shared_ptr<std::vector<std::uint16_t>> order = nullptr;  // of both tensors

  const std::vector<float>& input(Tensor t) const { return t == Tensor::kKey ? keys : values; }
  const TensorRules& tensor_rules(Tensor t) const {
    return t == Tensor::kKey ? rules.key : rules.value;
  }
};

// Multiples of 2^-6 in [-16, 16], as fp16 activations are: the float arithmetic of codes is exact.
inline std::vector<float> grid_values(std::size_t n, std::uint64_t seed) {
  Philox random(seed, 1, 0);
  std::vector<float> out(n);
  for (float& x : out) {
    x = (static_cast<int>(random.below(2049)) - 1024) * 0x1p-6f;
  }
  return out;
}

// Sums of four uniforms, some channels 16 times as large: keys and values look like this.
inline std::vector<float> lifelike_values(std::size_t n, std::size_t dim, std::uint64_t seed) {
  Philox random(seed, 2, 0);
  std::vector<float> out(n);
  for (std::size_t at = 0; at < n; ++at) {
    float sum = 0;
    for (int part = 0; part < 4; ++part) {
      sum += static_cast<float>(random.below(1u << 20)) * 0x1p-20f - 0.5f;
    }
    out[at] = at % dim % 13 == 5 ? 16 * sum + 3 : sum;
  }
  return out;
}

// Random tiers with the layout's counts, other ones for each head.
inline std::vector<std::uint8_t> random_tiers(const BlockLayout& layout, std::uint64_t seed) {
  Philox random(seed, 3, 0);
  std::vector<std::uint8_t> tiers;
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    const std::size_t first = tiers.size();
    for (std::uint32_t tier = 0; tier < layout.n_tiers(); ++tier) {
      tiers.insert(tiers.end(), layout.tier_tokens(tier), static_cast<std::uint8_t>(tier));
    }
    for (std::uint32_t token = layout.shape().n_tokens - 1; token > 0; --token) {
      std::swap(tiers[first + token], tiers[first + random.below(token + 1)]);
    }
  }
  return tiers;
}

inline CodecCase make_case(const BlockShape& shape, const QuantRules& rules, bool on_grid,
                           std::uint64_t seed) {
  const std::size_t rows = std::size_t{shape.n_tokens} * shape.n_kv_heads;
  const auto draw = [&](std::size_t dim, std::uint64_t part) {
    return on_grid ? grid_values(rows * dim, 2 * seed + part)
                   : lifelike_values(rows * dim, dim, 2 * seed + part);
  };
  CodecCase c{shape, rules, draw(shape.key_dim, 0), draw(shape.value_dim, 1),
              random_tiers(BlockLayout(shape), seed)};
  // Factors around 1 and a random order of channels, head by head.
  const std::size_t row = std::size_t{shape.n_kv_heads} * std::max(shape.key_dim, shape.value_dim);
  Philox random(seed, 4, 0);
  c.given = std::make_shared<std::vector<float>>();
  for (std::size_t i = 0; i < row; ++i) {
    c.given->push_back(0.5f + static_cast<float>(random.below(64)) / 32);
  }
  c.order = std::make_shared<std::vector<std::uint16_t>>();
  for (const std::uint32_t dim : {shape.key_dim, shape.value_dim}) {
    for (std::uint32_t head = 0; head < shape.n_kv_heads; ++head) {
      const std::size_t first = c.order->size();
      for (std::uint32_t channel = 0; channel < dim; ++channel) {
        c.order->push_back(static_cast<std::uint16_t>(channel));
        std::swap(c.order->back(), (*c.order)[first + random.below(channel + 1)]);
      }
    }
  }
  const std::size_t key_row = std::size_t{shape.n_kv_heads} * shape.key_dim;
  c.rules.key.given_factors = std::span(*c.given).first(key_row);
  c.rules.value.given_factors =
      std::span(*c.given).first(std::size_t{shape.n_kv_heads} * shape.value_dim);
  c.rules.key.channel_order = std::span(*c.order).first(key_row);
  c.rules.value.channel_order = std::span(*c.order).subspan(key_row);
  c.rules.key.channel_weights = c.rules.key.given_factors;
  return c;
}

// The shapes that tests start from: K 4/3 channelwise, V 3/2 channel-separable with byte
// parameters.
inline BlockShape default_shape(std::uint32_t n_tokens, std::uint32_t n_kv_heads = 2,
                                std::uint32_t head_dim = 32) {
  BlockShape s{n_tokens, n_kv_heads, head_dim, head_dim, {}, {}};
  s.key.n_classes = s.value.n_classes = 2;
  s.key.bits = {4, 3};
  s.key.class0_tokens = n_tokens / 3;
  s.value.granularity = Granularity::kChannelSeparable;
  s.value.token_params = TokenParams::kByte;
  s.value.bits = {3, 2};
  s.value.class0_tokens = n_tokens / 2;
  return s;
}

class Encoded {
 public:
  explicit Encoded(const CodecCase& c) : layout_(c.shape), bytes_(layout_.total_bytes()) {
    std::fill(bytes_.begin(), bytes_.end(), std::byte{0xcd});
    encode_block(layout_, c.rules, c.keys, c.values, c.tiers, bytes_.data());
  }

  const BlockLayout& layout() const { return layout_; }
  AlignedVector<std::byte>& bytes() { return bytes_; }
  const AlignedVector<std::byte>& bytes() const { return bytes_; }

  std::vector<float> decoded(Tensor t) const {
    const BlockShape& s = layout_.shape();
    std::vector<float> out(std::size_t{s.n_tokens} * s.n_kv_heads * layout_.head_dim(t), -777.0f);
    if (t == Tensor::kKey) {
      decode_block(layout_, bytes_.data(), out, {});
    } else {
      decode_block(layout_, bytes_.data(), {}, out);
    }
    return out;
  }

  // Codes of a class, [slot of the class][channel of the head].
  std::vector<std::uint8_t> codes(Tensor t, std::uint32_t head, int cls) const {
    const std::size_t tokens = layout_.class_tokens(t, cls), dim = layout_.head_dim(t);
    const bool is_key = t == Tensor::kKey;
    std::vector<std::uint8_t> out(tokens * dim);
    for (std::uint32_t group = 0; group < layout_.n_groups(t); ++group) {
      const std::size_t width = layout_.group_channels(t, group);
      std::vector<std::uint8_t> group_codes(tokens * width);
      format::unpack_codes(layout_.code_bits(t, cls, group), is_key ? tokens : width,
                           is_key ? width : tokens,
                           std::span(bytes_).subspan(layout_.codes(t, head, cls, group),
                                                     layout_.codes_size(t, cls, group)),
                           group_codes);
      for (std::size_t slot = 0; slot < tokens; ++slot) {
        for (std::size_t c = 0; c < width; ++c) {
          out[slot * dim + layout_.first_channel(t, group) + c] =
              group_codes[is_key ? slot * width + c : c * tokens + slot];
        }
      }
    }
    return out;
  }

  Half half(std::size_t offset, std::size_t index) const {
    Half h;
    std::memcpy(&h, &bytes_[offset + 2 * index], 2);
    return h;
  }
  double value(std::size_t offset, std::size_t index) const {
    return half_to_float(half(offset, index));
  }
  int byte(std::size_t offset, std::size_t index) const {
    return std::to_integer<int>(bytes_[offset + index]);
  }

 private:
  BlockLayout layout_;
  AlignedVector<std::byte> bytes_;
};

// Slot -> token of one head, by stable sort.
inline std::vector<std::uint32_t> order_of(const CodecCase& c, std::uint32_t head) {
  std::vector<std::uint32_t> order(c.shape.n_tokens);
  std::iota(order.begin(), order.end(), 0u);
  const std::uint8_t* tiers = &c.tiers[std::size_t{head} * c.shape.n_tokens];
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return tiers[a] < tiers[b]; });
  return order;
}

}  // namespace zipcache::quant
