#include "kernels/cuda/attention_check.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/half.h"

namespace zipcache::cuda {
namespace {

constexpr double kLog2E = 1.4426950408889634;

std::vector<float> rounded(std::span<const float> from) {
  std::vector<float> out(from.size());
  std::ranges::transform(from, out.begin(), round_to_half);
  return out;
}

// Attention with keys, values and weights rounded to fp16.
ref::AttentionResult naive_attention(ref::AttentionCase c) {
  const std::vector<float> k = rounded(c.k), v = rounded(c.v);
  c.k = k;
  c.v = v;
  ref::AttentionResult r = ref::attention(c, true);
  std::ranges::fill(r.out, 0.0);
  for (std::size_t row = 0; row < c.n_rows * c.n_heads && c.n_tokens > 0; ++row) {
    const std::span<const double> weights(r.weights.data() + row * c.n_tokens, c.n_tokens);
    const double largest = *std::ranges::max_element(weights);
    for (std::size_t token = 0; largest > 0 && token < c.n_tokens; ++token) {
      const double weight = round_to_half(static_cast<float>(weights[token] / largest)) * largest;
      for (std::size_t channel = 0; channel < c.value_dim; ++channel) {
        r.out[row * c.value_dim + channel] += weight * v[token * c.value_dim + channel];
      }
    }
  }
  return r;
}

// Kernels round the scaled query of a channel: one error for all tokens, times the channel's range.
// Its standard deviation in a score (base 2), about, for the worst row.
double query_rounding(const ref::AttentionCase& c) {
  std::vector<double> range(c.key_dim);
  for (std::size_t channel = 0; channel < c.key_dim; ++channel) {
    float low = 0, high = 0;  // fp16 keys have no minimum to take out of the product
    for (std::size_t at = channel; at < c.k.size(); at += c.key_dim) {
      low = std::min(low, c.k[at]);
      high = std::max(high, c.k[at]);
    }
    range[channel] = high - low;
  }
  double worst = 0;
  for (std::size_t row = 0; row < c.n_rows * c.n_heads; ++row) {
    double sum = 0;
    for (std::size_t channel = 0; channel < c.key_dim; ++channel) {
      const double share = double{c.q[row * c.key_dim + channel]} * c.scale * range[channel];
      sum += share * share;
    }
    worst = std::max(worst, std::sqrt(sum) * kLog2E * 0x1p-12);
  }
  return worst;
}

double rms(double sum_of_squares, double n) { return n > 0 ? std::sqrt(sum_of_squares / n) : 0; }

}  // namespace

void AttentionCheck::add(const ref::AttentionCase& c, std::span<const float> out,
                         std::span<const float> lse) {
  const ref::AttentionResult exact = ref::attention(c), naive = naive_attention(c);
  query_error_ = std::max(query_error_, query_rounding(c));
  for (std::size_t at = 0; at < out.size(); ++at) {
    const double x = out[at];
    ASSERT_TRUE(std::isfinite(x)) << "element " << at;
    error_ += (x - exact.out[at]) * (x - exact.out[at]);
    naive_error_ += (naive.out[at] - exact.out[at]) * (naive.out[at] - exact.out[at]);
    size_ += exact.out[at] * exact.out[at];
    n_ += 1;
  }
  for (std::size_t at = 0; at < lse.size(); ++at) {
    const double expected = exact.lse[at] * kLog2E, x = lse[at];
    if (std::isinf(expected)) {
      ASSERT_EQ(x, expected) << "row " << at;
      continue;
    }
    lse_error_ = std::max(lse_error_, std::abs(x - expected));
    naive_lse_error_ = std::max(naive_lse_error_, std::abs(naive.lse[at] * kLog2E - expected));
  }
}

void AttentionCheck::expect_close() const {
  EXPECT_LE(rms(error_, n_), 2.5 * rms(naive_error_, n_) + 3e-4 * rms(size_, n_))
      << "size " << rms(size_, n_) << ", error of the fp16 path " << rms(naive_error_, n_);
  EXPECT_LE(lse_error_, 3 * naive_lse_error_ + 4 * query_error_ + 5e-4);
  ::testing::Test::RecordProperty(
      "error_over_fp16_path", std::to_string(rms(error_, n_) / (rms(naive_error_, n_) + 1e-12)));
  ::testing::Test::RecordProperty("relative_error",
                                  std::to_string(rms(error_, n_) / (rms(size_, n_) + 1e-12)));
}

}  // namespace zipcache::cuda
