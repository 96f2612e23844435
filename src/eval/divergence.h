// How far predictions are from those of the reference, position by position and summed up: names
// and arithmetic of llama-perplexity --kl-divergence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "eval/statistics.h"

namespace zipcache::eval {

// Log-probabilities of the reference, 2 bytes each: 65536 steps over the 16 nats below the
// likeliest token, everything below counts as the least of them.
class ReferenceRows {
 public:
  ReferenceRows(std::size_t n_rows, std::size_t n_vocab);

  // logits [n_vocab]. Different rows may be stored by several threads at once.
  void store(std::size_t row, const float* logits);

  std::size_t n_rows() const { return scales_.size(); }
  std::size_t n_vocab() const { return n_vocab_; }
  float log_prob(std::size_t row, std::size_t token) const {
    return log_prob_of(row, steps(row)[token]);
  }
  // [n_vocab], and what a number of steps stands for.
  const std::uint16_t* steps(std::size_t row) const { return steps_.data() + row * n_vocab_; }
  float log_prob_of(std::size_t row, std::uint16_t n_steps) const {
    return scales_[row].step * float(n_steps) + scales_[row].least;
  }

 private:
  struct Scale {
    float step = 0;
    float least = 0;
  };
  std::size_t n_vocab_;
  std::vector<std::uint16_t> steps_;  // [n_rows, n_vocab]
  std::vector<Scale> scales_;
};

// One prediction beside the reference's.
struct PositionResult {
  float nll = 0;       // -ln p(next token)
  float nll_base = 0;  // the reference's
  float kld = 0;       // KL(reference || this), nats
  float p_diff = 0;    // p(next token) - the reference's
  bool same_top = false;
};

// REQUIRES: logits [reference.n_vocab()], target < n_vocab.
PositionResult compare(const float* logits, const ReferenceRows& reference, std::size_t row,
                       std::int32_t target);

struct DivergenceSummary {
  std::size_t n = 0;
  Estimate ppl, ppl_base, ln_ppl_ratio, ppl_ratio, ppl_difference;
  double ln_ppl_correlation = 0;
  Estimate kld;
  std::vector<float> sorted_kld;  // for percentiles
  Estimate p_diff, p_diff_rms;
  std::vector<float> sorted_p_diff;
  Estimate same_top;
};

// REQUIRES: not empty.
DivergenceSummary summarize(std::span<const PositionResult> positions);

// The lines that llama-perplexity --kl-divergence ends with.
std::string to_text(const DivergenceSummary& summary);

}  // namespace zipcache::eval
