#include "ref/attention_ref.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace zipcache::ref {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

double logit(const AttentionCase& c, std::size_t row, std::size_t head, std::size_t token) {
  if (!c.visible.empty() && c.visible[row * c.n_tokens + token] == 0) {
    return kMinusInfinity;
  }
  const std::size_t kv_head = head / (c.n_heads / c.n_kv_heads);
  const float* q = &c.q[(row * c.n_heads + head) * c.key_dim];
  const float* k = &c.k[(token * c.n_kv_heads + kv_head) * c.key_dim];
  double dot = 0;
  for (std::size_t channel = 0; channel < c.key_dim; ++channel) {
    dot += static_cast<double>(q[channel]) * k[channel];
  }
  double s = c.scale * dot;
  if (c.softcap != 0) {
    s = c.softcap * std::tanh(s / c.softcap);
  }
  if (!c.bias.empty()) {
    s += (c.slopes.empty() ? 1.0 : c.slopes[head]) * c.bias[row * c.n_tokens + token];
  }
  return s;
}

double log_sum_exp(const std::vector<double>& logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  if (largest == kMinusInfinity) {
    return kMinusInfinity;
  }
  double sum = 0;
  for (const double s : logits) {
    sum += std::exp(s - largest);
  }
  return largest + std::log(sum);
}

}  // namespace

AttentionResult attention(const AttentionCase& c, bool with_weights) {
  ZC_CHECK(c.n_kv_heads > 0 && c.n_heads % c.n_kv_heads == 0);
  ZC_CHECK(c.q.size() == c.n_rows * c.n_heads * c.key_dim);
  ZC_CHECK(c.k.size() == c.n_tokens * c.n_kv_heads * c.key_dim);
  ZC_CHECK(c.v.size() == c.n_tokens * c.n_kv_heads * c.value_dim);
  AttentionResult result;
  result.out.assign(c.n_rows * c.n_heads * c.value_dim, 0.0);
  for (std::size_t row = 0; row < c.n_rows; ++row) {
    for (std::size_t head = 0; head < c.n_heads; ++head) {
      std::vector<double> logits;
      for (std::size_t token = 0; token < c.n_tokens; ++token) {
        logits.push_back(logit(c, row, head, token));
      }
      logits.push_back(c.sinks.empty() ? kMinusInfinity : c.sinks[head]);
      const double lse = log_sum_exp(logits);
      result.lse.push_back(lse);

      const std::size_t kv_head = head / (c.n_heads / c.n_kv_heads);
      double* out = &result.out[(row * c.n_heads + head) * c.value_dim];
      for (std::size_t token = 0; token < c.n_tokens; ++token) {
        // Not exp(-inf - -inf): a hidden token weighs nothing, whatever its value.
        const double weight = logits[token] == kMinusInfinity ? 0 : std::exp(logits[token] - lse);
        if (with_weights) {
          result.weights.push_back(weight);
        }
        const float* v = &c.v[(token * c.n_kv_heads + kv_head) * c.value_dim];
        for (std::size_t channel = 0; weight != 0 && channel < c.value_dim; ++channel) {
          out[channel] += weight * v[channel];
        }
      }
    }
  }
  return result;
}

std::vector<std::uint8_t> causal_mask(std::size_t n_rows, std::size_t n_tokens,
                                      std::size_t first_position) {
  std::vector<std::uint8_t> visible(n_rows * n_tokens);
  for (std::size_t row = 0; row < n_rows; ++row) {
    for (std::size_t token = 0; token < n_tokens; ++token) {
      visible[row * n_tokens + token] = token <= first_position + row;
    }
  }
  return visible;
}

}  // namespace zipcache::ref
