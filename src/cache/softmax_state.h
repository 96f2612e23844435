// The running state of softmax attention for some query rows: largest logit m, sum l of 2^(s - m)
// and the sum of values weighted by 2^(s - m). Associative to merge; the empty state is the
// identity.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace zipcache::cache {

// A view; memory of floats(n_rows, dim) belongs to the caller. Logits are base 2.
class SoftmaxState {
 public:
  static constexpr std::size_t floats(std::size_t n_rows, std::size_t dim) {
    return n_rows * (dim + 2);
  }
  SoftmaxState(float* data, std::size_t n_rows, std::size_t dim)
      : max_(data), sum_(data + n_rows), values_(data + 2 * n_rows), n_rows_(n_rows), dim_(dim) {}

  void clear() {
    std::fill_n(max_, n_rows_, -std::numeric_limits<float>::infinity());
    std::fill_n(sum_, n_rows_ * (dim_ + 1), 0.0f);
  }

  float max(std::size_t row) const { return max_[row]; }
  float* values() { return values_; }

  // Makes `max` (>= the current one) the row's reference.
  void rescale(std::size_t row, float max) {
    if (max == max_[row]) {
      return;
    }
    const float factor = std::exp2(max_[row] - max);  // 0 for the empty state
    sum_[row] *= factor;
    float* values = values_ + row * dim_;
    for (std::size_t c = 0; c < dim_; ++c) {
      values[c] *= factor;
    }
    max_[row] = max;
  }
  void add_sum(std::size_t row, float sum) { sum_[row] += sum; }

  // One more logit without a value (attention sinks of some models).
  void add_logit(std::size_t row, float logit) {
    rescale(row, std::max(max_[row], logit));
    sum_[row] += std::exp2(logit - max_[row]);
  }

  void merge(const SoftmaxState& other) {
    for (std::size_t row = 0; row < n_rows_; ++row) {
      if (other.sum_[row] == 0.0f) {
        continue;
      }
      rescale(row, std::max(max_[row], other.max_[row]));
      const float factor = std::exp2(other.max_[row] - max_[row]);
      sum_[row] += factor * other.sum_[row];
      float* values = values_ + row * dim_;
      const float* others = other.values_ + row * dim_;
      for (std::size_t c = 0; c < dim_; ++c) {
        values[c] += factor * others[c];
      }
    }
  }

  // Writes the attention output of a row ([dim], zeros if nothing was visible) and returns its
  // log2-sum-exp2 (-infinity if nothing was visible).
  float write(std::size_t row, float* out) const {
    const float* values = values_ + row * dim_;
    const float inverse = sum_[row] == 0.0f ? 0.0f : 1.0f / sum_[row];
    for (std::size_t c = 0; c < dim_; ++c) {
      out[c] = values[c] * inverse;
    }
    return max_[row] + std::log2(sum_[row]);
  }

 private:
  float* max_;
  float* sum_;
  float* values_;
  std::size_t n_rows_;
  std::size_t dim_;
};

}  // namespace zipcache::cache
