#include <algorithm>
#include <vector>

#include "base/check.h"
#include "format/block_params.h"
#include "quant/block_codec.h"
#include "quant/tensor_encoder.h"

namespace zipcache::quant {
namespace {

// What can be encoded apart: heads [begin, end) of a tensor.
struct Part {
  Tensor tensor;
  std::uint32_t begin, end;
};

// Where tokens share their range among the heads, a tensor is one part.
void add_parts(const BlockLayout& layout, Tensor tensor, std::vector<Part>* parts) {
  const std::uint32_t n_heads = layout.shape().n_kv_heads;
  const std::uint32_t step = layout.tensor(tensor).slot_shared ? n_heads : 1;
  for (std::uint32_t head = 0; head < n_heads; head += step) {
    parts->push_back({tensor, head, head + step});
  }
}

std::size_t tensor_size(const BlockLayout& layout, Tensor t) {
  return std::size_t{layout.shape().n_tokens} * layout.shape().n_kv_heads * layout.head_dim(t);
}

}  // namespace

void encode_block(const BlockLayout& layout, const QuantRules& rules, std::span<const float> keys,
                  std::span<const float> values, std::span<const std::uint8_t> tiers,
                  std::byte* block, TaskTeam* team) {
  encode_on(nullptr, layout, rules, keys, values, tiers, block, team);
}

void encode_on(const Grids* given, const BlockLayout& layout, const QuantRules& rules,
               std::span<const float> keys, std::span<const float> values,
               std::span<const std::uint8_t> tiers, std::byte* block, TaskTeam* team) {
  const std::size_t n_tokens = layout.shape().n_tokens;
  ZC_CHECK(keys.size() == tensor_size(layout, Tensor::kKey));
  ZC_CHECK(values.size() == tensor_size(layout, Tensor::kValue));
  ZC_CHECK(tiers.size() == n_tokens * layout.shape().n_kv_heads ||
           (tiers.empty() && layout.n_tiers() == 1));
  std::fill_n(block, layout.total_bytes(), std::byte{0});
  if (layout.n_tiers() > 1) {
    for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
      format::write_tiers(layout, block, head, &tiers[head * n_tokens]);
    }
  }
  std::vector<Part> parts;
  add_parts(layout, Tensor::kKey, &parts);
  add_parts(layout, Tensor::kValue, &parts);
  for_each(team, parts.size(), [&](std::size_t i) {
    const auto& [tensor, begin, end] = parts[i];
    const bool is_key = tensor == Tensor::kKey;
    TensorEncoder(layout, tensor, is_key ? rules.key : rules.value, is_key ? keys : values, block,
                  given)
        .encode(begin, end);
  });
}

void replace_keys(const BlockLayout& layout, const QuantRules& rules, std::span<const float> keys,
                  std::byte* block) {
  ZC_CHECK(keys.size() == tensor_size(layout, Tensor::kKey));
  // What was given when the block was made stays: it is read back from the block.
  const std::size_t dim = layout.shape().key_dim, n_heads = layout.shape().n_kv_heads;
  std::vector<std::uint16_t> order(dim * n_heads);
  std::vector<float> factors(dim * n_heads), stored(dim), weights(dim * n_heads);
  TensorRules kept = rules.key;
  for (std::uint32_t head = 0; head < n_heads; ++head) {
    format::channel_order(layout, block, Tensor::kKey, head, &order[head * dim]);
    for (std::size_t wide = 0; wide < layout.shape().key.wide_channels; ++wide) {
      weights[head * dim + order[head * dim + wide]] = 1.0f;
    }
    // Where all tokens are exact there are none.
    if (layout.shape().key.given_factors && layout.param_slots(Tensor::kKey) > 0) {
      format::load_halves(block + layout.channel_factor(Tensor::kKey, head, 0), dim, stored.data());
      for (std::size_t c = 0; c < dim; ++c) {
        factors[head * dim + order[head * dim + c]] = stored[c];
      }
    }
  }
  kept.channel_order = order;
  kept.given_factors = factors;
  kept.channel_weights = weights;
  TensorEncoder(layout, Tensor::kKey, kept, keys, block).encode(0, layout.shape().n_kv_heads);
}

void replace_values(const BlockLayout& from, const std::byte* block, const BlockLayout& layout,
                    const TensorRules& rules, std::span<const float> values, std::byte* out) {
  ZC_CHECK(from.shape().key == layout.shape().key &&
           from.shape().n_tokens == layout.shape().n_tokens);
  ZC_CHECK(values.size() == tensor_size(layout, Tensor::kValue));
  std::fill_n(out, layout.total_bytes(), std::byte{0});
  std::vector<std::uint8_t> tiers(layout.shape().n_tokens);
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    format::read_tiers(from, block, head, tiers.data());
    format::write_tiers(layout, out, head, tiers.data());
    format::copy_tensor(from, block, layout, out, Tensor::kKey, head);
  }
  TensorEncoder(layout, Tensor::kValue, rules, values, out).encode(0, layout.shape().n_kv_heads);
}

}  // namespace zipcache::quant
