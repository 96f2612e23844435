// What is kept of a sequence's queries: how much each channel of its keys matters, or by what keys
// are balanced.
#include <algorithm>
#include <cmath>

#include "cache/sealer.h"

namespace zipcache::cache {
namespace {

// TokenGroup::query_power
float power_of(std::uint8_t code) {
  return code == 0 ? 0.0f : std::exp2((static_cast<float>(code) - 128.0f) / 8.0f);
}
std::uint8_t power_code(float power) {
  if (!(power > 0.0f)) {  // NaN, too
    return 0;
  }
  return static_cast<std::uint8_t>(
      std::clamp(std::nearbyint(8.0f * std::log2(power)) + 128.0f, 1.0f, 255.0f));
}
// Fewer new tokens than this share of a group move its mean by less than a step of the code.
constexpr std::uint32_t kPowerShare = 16;

}  // namespace

void Sealer::observe_queries(const float* q, std::size_t row_stride, std::size_t head_stride,
                             std::uint32_t heads_per_group) {
  const policy::TensorPolicy& key = cache_.policy().key;
  const bool balances = key.factors == policy::Factors::kBalanced;
  if (!balances && key.wide_bp == 0) {
    return;
  }
  const std::uint32_t dim = cache_.key_dim(), width = cache_.shape().key_row;
  for (const StepGroup& step : scratch_.groups) {
    TokenGroup& group = find_group(step.id);
    if (balances ? !group.key_factors.empty() : step.n_rows < step.ordinal / kPowerShare) {
      continue;
    }
    scratch_.query_sums.assign(width, 0.0f);
    std::vector<float>& sums = balances ? group.query_max : scratch_.query_sums;
    sums.resize(width);
    for (const std::uint32_t row : std::span(scratch_.rows).subspan(step.first_row, step.n_rows)) {
      for (std::uint32_t head = 0; head < cache_.n_kv_heads() * heads_per_group; ++head) {
        const float* x = q + row * row_stride + head * head_stride;
        float* sum = sums.data() + std::size_t{head / heads_per_group} * dim;
        for (std::uint32_t c = 0; c < dim; ++c) {
          sum[c] = balances ? std::max(sum[c], std::abs(x[c])) : sum[c] + x[c] * x[c];
        }
      }
    }
    if (!balances) {
      add_query_power(group, step, heads_per_group);
    }
  }
}

void Sealer::add_query_power(TokenGroup& group, const StepGroup& step,
                             std::uint32_t heads_per_group) const {
  group.query_power.resize(cache_.shape().key_row);
  const auto n_before = static_cast<float>(step.ordinal);
  const float n_all = n_before + static_cast<float>(step.n_rows);
  for (std::size_t c = 0; c < group.query_power.size(); ++c) {
    const float added = scratch_.query_sums[c] / static_cast<float>(heads_per_group);
    group.query_power[c] = power_code((power_of(group.query_power[c]) * n_before + added) / n_all);
  }
}

// The balancer of MiKV as the factor that stored keys are multiplied with: 1/b = sqrt(max |k| /
// max |q|), of the tokens staged at the first sealing.
void Sealer::balance_keys(TokenGroup& group, const Slots& staged) {
  if (cache_.policy().key.factors != policy::Factors::kBalanced || !group.key_factors.empty()) {
    return;
  }
  const std::size_t width = cache_.shape().key_row;
  std::vector<float> largest(width), row(width);
  for (const LayerCache::Slot& slot : staged) {
    cache_.read_staged(slot, Tensor::kKey, row.data());
    for (std::size_t c = 0; c < width; ++c) {
      largest[c] = std::max(largest[c], std::abs(row[c]));
    }
  }
  group.query_max.resize(width);
  for (std::size_t c = 0; c < width; ++c) {
    const float factor = std::sqrt(largest[c] / group.query_max[c]);
    largest[c] = factor > 0 && std::isfinite(factor) ? factor : 1.0f;
  }
  group.key_factors = std::move(largest);
  group.query_max = {};
}

std::vector<float> Sealer::channel_weights(const TokenGroup& group) {
  std::vector<float> weights(group.query_power.size());
  std::transform(group.query_power.begin(), group.query_power.end(), weights.begin(), power_of);
  return weights;
}

}  // namespace zipcache::cache
