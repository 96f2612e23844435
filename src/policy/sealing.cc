// Which tokens seal when, in blocks of which shape.
#include <algorithm>

#include "base/aligned.h"
#include "base/check.h"
#include "format/block_join.h"
#include "policy/policy.h"

namespace zipcache::policy {
namespace {

// An even number of the `length` elements of a vector: as many of the largest as of the smallest.
std::uint16_t outlier_count(std::uint32_t length, std::uint32_t share_bp) {
  constexpr std::uint64_t kHalves = 20000;
  const std::uint64_t half = (std::uint64_t{length} * share_bp + kHalves / 2) / kHalves;
  return static_cast<std::uint16_t>(std::min<std::uint64_t>(2 * half, length / 2 * 2));
}

// As many as the share asks for, in steps of 16 that leave some for either width.
std::uint16_t wide_channels(std::uint32_t head_dim, std::uint32_t share_bp) {
  constexpr std::uint32_t kStep = 16, kWhole = 10000 * kStep;
  const std::uint32_t steps = (head_dim * share_bp + kWhole / 2) / kWhole;
  return static_cast<std::uint16_t>(kStep * std::min(steps, head_dim / kStep - 1));
}

// `vector`: elements of a channel of K, or of a token of V.
format::TensorFormat tensor_format(const TensorPolicy& tensor, std::uint32_t min_ranked_tokens,
                                   std::uint32_t n_tokens, std::uint32_t vector) {
  format::TensorFormat format;
  format.granularity = tensor.granularity;
  format.token_params = tensor.token_params;
  format.class_factors = tensor.class_factors;
  format.given_factors = tensor.factors != Factors::kOwn;
  format.reordered = tensor.reordered;
  format.slot_shared = tensor.slot_shared;
  format.group_channels = tensor.group_channels;
  format.group_tokens = tensor.group_tokens;
  format.rank = n_tokens <= tensor.small_block_tokens ? tensor.small_block_rank : tensor.rank;
  format.outliers = outlier_count(vector, tensor.outlier_bp);
  format.n_classes = tensor.n_classes;
  format.bits = tensor.bits;
  if (tensor.n_classes == 2) {
    const bool too_few_to_rank = n_tokens < min_ranked_tokens;
    format.class0_tokens = too_few_to_rank ? n_tokens
                                           : saliency::salient_tokens(n_tokens, tensor.salient_bp,
                                                                      tensor.class_multiple);
  }
  return format;
}

// What a budget is spent on, in this order: the shares that each further bit of a block goes to, by
// what it is worth (decision 0006).
struct Shares {
  std::uint32_t key_wide_bp, key_salient_bp, value_salient_bp;
};
constexpr std::array<Shares, 7> kSpending{{
    {0, 0, 0},
    {2500, 0, 0},
    {2500, 1500, 0},
    {2500, 2000, 3500},
    {2500, 3000, 5000},
    {5000, 3000, 5000},
    {5000, 10000, 10000},
}};
constexpr std::uint32_t kStageSteps = 128;  // per line of the table
constexpr std::uint32_t kSpendingSteps = kStageSteps * (kSpending.size() - 1);

// A policy's two tensors.
struct Tensors {
  TensorPolicy key, value;
};

void spend(Tensors& tensors, std::uint32_t step) {
  const std::size_t stage = std::min<std::size_t>(step / kStageSteps, kSpending.size() - 2);
  const std::uint32_t within = step - static_cast<std::uint32_t>(stage) * kStageSteps;
  const Shares &from = kSpending[stage], &to = kSpending[stage + 1];
  const auto between = [within](std::uint32_t a, std::uint32_t b) {
    return a + (b - a) * within / kStageSteps;
  };
  tensors.key.wide_bp = between(from.key_wide_bp, to.key_wide_bp);
  tensors.key.salient_bp = between(from.key_salient_bp, to.key_salient_bp);
  tensors.value.salient_bp = between(from.value_salient_bp, to.value_salient_bp);
}

std::uint32_t centibits(const format::BlockShape& shape) {
  const std::uint64_t elements =
      std::uint64_t{shape.n_tokens} * shape.n_kv_heads * (shape.key_dim + shape.value_dim);
  const std::uint64_t bits = format::BlockLayout(shape).total_bytes() * 8;
  return static_cast<std::uint32_t>((bits * 100 + elements - 1) / elements);
}

// What a shape is without its formats.
struct Extent {
  std::uint32_t n_tokens, n_kv_heads, key_dim, value_dim;
};

// In the formats of `tensors`, within a budget of `kv_centibits` if that is not 0.
format::BlockShape shape_of(const Extent& extent, Tensors tensors, std::uint32_t min_ranked_tokens,
                            std::uint32_t kv_centibits) {
  format::BlockShape shape;
  shape.n_tokens = extent.n_tokens;
  shape.n_kv_heads = extent.n_kv_heads;
  shape.key_dim = extent.key_dim;
  shape.value_dim = extent.value_dim;
  const auto set_formats = [&] {
    shape.key = tensor_format(tensors.key, min_ranked_tokens, shape.n_tokens, shape.n_tokens);
    shape.key.wide_channels = wide_channels(shape.key_dim, tensors.key.wide_bp);
    shape.key.wide_bits = tensors.key.wide_bits;
    shape.value = tensor_format(tensors.value, min_ranked_tokens, shape.n_tokens, shape.value_dim);
  };
  if (kv_centibits > 0) {
    std::uint32_t step = 0, too_much = kSpendingSteps + 1;
    while (step + 1 < too_much) {
      const std::uint32_t middle = (step + too_much) / 2;
      spend(tensors, middle);
      set_formats();
      (centibits(shape) <= kv_centibits ? step : too_much) = middle;
    }
    spend(tensors, step);
  }
  set_formats();
  return shape;
}

// n tokens in blocks that differ by one multiple at most, larger ones first; the last one lacks
// what n lacks to a multiple.
std::vector<std::uint32_t> even_blocks(const Policy& policy, std::uint32_t n) {
  const std::uint32_t units = n / policy.seal_multiple + (n % policy.seal_multiple != 0 ? 1 : 0);
  if (units == 0) {
    return {};
  }
  const std::uint32_t units_per_block =
      policy.block_tokens == 0 ? units : policy.block_tokens / policy.seal_multiple;
  const std::uint32_t n_blocks = units / units_per_block + (units % units_per_block != 0 ? 1 : 0);
  std::vector<std::uint32_t> blocks(n_blocks, units / n_blocks * policy.seal_multiple);
  for (std::uint32_t block = 0; block < units % n_blocks; ++block) {
    blocks[block] += policy.seal_multiple;
  }
  blocks.back() -= units * policy.seal_multiple - n;
  return blocks;
}

}  // namespace

quant::QuantRules Policy::quant_rules(std::uint32_t layer) const {
  quant::QuantRules rules{key.rules, value.rules};
  if (const auto found = given.find(layer); found != given.end()) {
    const LayerChannels& channels = found->second;
    rules.key.given_factors = channels.key_factors;
    rules.key.channel_order = channels.key_order;
    rules.value.given_factors = channels.value_factors;
    rules.value.channel_order = channels.value_order;
  }
  return rules;
}

Status serves_layer(const Policy& policy, std::uint32_t layer, std::uint32_t n_kv_heads,
                    std::uint32_t key_dim, std::uint32_t value_dim) {
  const auto is_calibrated = [](const TensorPolicy& tensor) {
    return tensor.factors == Factors::kGiven || tensor.reordered;
  };
  if (!is_calibrated(policy.key) && !is_calibrated(policy.value)) {
    return ok_status();
  }
  const auto given = policy.given.find(layer);
  if (given != policy.given.end() && given->second.n_kv_heads == n_kv_heads &&
      given->second.key_dim == key_dim && given->second.value_dim == value_dim) {
    return ok_status();
  }
  const auto words = [](std::uint32_t heads, std::uint32_t key, std::uint32_t value) {
    return std::to_string(heads) + " KV heads of " + std::to_string(key) + " (K) and " +
           std::to_string(value) + " (V) channels";
  };
  const std::string calibrated =
      given == policy.given.end()
          ? "lacks it among its " + std::to_string(policy.given.size()) + " layers"
          : "says " +
                words(given->second.n_kv_heads, given->second.key_dim, given->second.value_dim);
  return unsupported("layer " + std::to_string(layer) + " has " +
                     words(n_kv_heads, key_dim, value_dim) + ", but the calibration " + calibrated +
                     ": it is another model's; make one of this with zipcache calibrate -m MODEL "
                     "-o FILE");
}

format::BlockShape block_shape(const Policy& policy, std::uint32_t n_tokens,
                               std::uint32_t n_kv_heads, std::uint32_t key_dim,
                               std::uint32_t value_dim, bool hold_values) {
  ZC_CHECK(policy.seals());
  format::BlockShape shape =
      shape_of({n_tokens, n_kv_heads, key_dim, value_dim}, {policy.key, policy.value},
               policy.min_ranked_tokens, policy.kv_centibits);
  if (hold_values) {
    shape.value = {.granularity = format::Granularity::kTokenwise,
                   .bits = {format::kExactBits, format::kExactBits}};
  }
  return shape;
}

std::uint32_t least_centibits(const Policy& policy, std::uint32_t n_tokens,
                              std::uint32_t n_kv_heads, std::uint32_t key_dim,
                              std::uint32_t value_dim) {
  return centibits(shape_of({n_tokens, n_kv_heads, key_dim, value_dim}, {policy.key, policy.value},
                            policy.min_ranked_tokens, 1));
}

std::optional<format::BlockShape> added_shape(const Policy& policy, const format::BlockShape& block,
                                              std::uint32_t n_tokens) {
  if (block.n_tokens < policy.min_ranked_tokens) {
    return std::nullopt;  // its one class is none for tokens to come
  }
  // Shares are taken to the token, or of a few that join all or none would be salient. In a small
  // block padding would cost more than that is worth (272 tokens: 3.57 bits instead of 3.43).
  constexpr std::uint32_t kSmall = 512, kLanes = 16;
  Tensors exact{policy.key, policy.value};
  exact.key.class_multiple = exact.value.class_multiple = block.n_tokens < kSmall ? kLanes : 1;
  const format::BlockShape whole =
      shape_of({block.n_tokens + n_tokens, block.n_kv_heads, block.key_dim, block.value_dim}, exact,
               policy.min_ranked_tokens, policy.kv_centibits);
  format::BlockShape added = block;
  added.n_tokens = n_tokens;
  const auto salient = [&](const format::TensorFormat& old, const format::TensorFormat& all) {
    if (old.n_classes == 1 || old.class0_tokens == block.n_tokens) {
      return n_tokens;
    }
    return old.class0_tokens == 0
               ? 0
               : std::min(all.class0_tokens - std::min(all.class0_tokens, old.class0_tokens),
                          n_tokens);
  };
  std::uint32_t key = salient(block.key, whole.key), value = salient(block.value, whole.value);
  if (block.value.n_classes == 1 || block.key.class0_tokens <= block.value.class0_tokens) {
    key = std::min(key, value);
  } else {
    value = std::min(value, key);
  }
  added.key.class0_tokens = key;
  added.value.class0_tokens = value;
  return format::joined_shape(block, added).has_value() ? std::optional(added) : std::nullopt;
}

std::uint32_t append_tokens(const Policy& policy, std::uint32_t n_tokens) {
  // Of what a sequence holds, tokens that wait may make up this many hundredths of a percent.
  constexpr std::uint64_t kShare = 150;
  const auto share = static_cast<std::uint32_t>(n_tokens * kShare / 10000);
  return std::clamp(share, policy.append_tokens,
                    std::max(policy.append_tokens, policy.seal_tokens));
}

std::uint32_t held_tokens(const Policy& policy, std::uint32_t n_tokens) {
  const auto share = [](std::uint32_t n, std::uint32_t basis_points) {
    return static_cast<std::uint32_t>(std::uint64_t{n} * basis_points / 10000);
  };
  std::uint32_t most = policy.hold_tokens;
  if (policy.hold_share_bp < 10000) {
    const std::uint32_t beyond = n_tokens - std::min(n_tokens, policy.hold_after);
    most = std::min(most, share(beyond, policy.hold_share_bp));
  }
  return std::max(most, share(n_tokens, policy.hold_bp));
}

std::vector<std::uint32_t> plan_seal(const Policy& policy, std::uint32_t n_sealable,
                                     std::uint32_t n_new) {
  if (!policy.seals()) {
    return {};
  }
  const bool seals_whole_chunk = policy.seal_chunks && n_new > 1;
  const std::uint32_t due = n_new >= policy.chunk_tokens
                                ? std::min(policy.chunk_tokens, policy.seal_tokens)
                                : policy.seal_tokens;
  if (!seals_whole_chunk && n_sealable < due) {
    return {};
  }
  ZC_CHECK(policy.seal_multiple >= 1 && policy.block_tokens % policy.seal_multiple == 0);

  // Tokens whose values stay exact for a while come in small blocks, so that no more of them wait
  // than must.
  const std::uint32_t rest = n_sealable % policy.seal_multiple;
  const std::uint32_t n_seal = rest > policy.rest_tokens ? n_sealable : n_sealable - rest;
  const std::uint32_t n_held = std::min(
      static_cast<std::uint32_t>(round_up(policy.value_hold_tokens, policy.value_hold_block)),
      n_seal);
  std::vector<std::uint32_t> blocks = even_blocks(policy, n_seal - n_held);
  for (std::uint32_t left = n_held; left > 0; left -= std::min(left, policy.value_hold_block)) {
    blocks.push_back(std::min(left, policy.value_hold_block));
  }
  return blocks;
}

}  // namespace zipcache::policy
