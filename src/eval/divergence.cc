#include "eval/divergence.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace zipcache::eval {
namespace {

constexpr float kNatsKept = 16.0f;
constexpr float kSteps = 65535.0f;

// ln sum exp(logits - max)
float log_sum_exp(const float* logits, std::size_t n, float max) {
  double sum = 0;
  for (std::size_t token = 0; token < n; ++token) {
    sum += std::exp(logits[token] - max);
  }
  return static_cast<float>(std::log(sum));
}

// Where the largest of n > 0 is. In two passes, of which the first is done several at a time.
template <typename T>
std::size_t first_largest(const T* x, std::size_t n) {
  T largest = x[0];
  for (std::size_t i = 1; i < n; ++i) {
    largest = std::max(largest, x[i]);
  }
  return static_cast<std::size_t>(std::find(x, x + n, largest) - x);
}

}  // namespace

ReferenceRows::ReferenceRows(std::size_t n_rows, std::size_t n_vocab)
    : n_vocab_(n_vocab), steps_(n_rows * n_vocab), scales_(n_rows) {}

void ReferenceRows::store(std::size_t row, const float* logits) {
  const auto [smallest, largest] = std::minmax_element(logits, logits + n_vocab_);
  const float max = *largest;
  const float min = std::max(*smallest, max - kNatsKept);
  const float step = (max - min) / kSteps;
  scales_[row] = {step, min - max - log_sum_exp(logits, n_vocab_, max)};
  std::uint16_t* out = steps_.data() + row * n_vocab_;
  const float inverse = step > 0 ? 1 / step : 0;
  for (std::size_t token = 0; token < n_vocab_; ++token) {
    const float n_steps = logits[token] > min ? inverse * (logits[token] - min) : 0;
    // NOLINTNEXTLINE(bugprone-incorrect-roundings): never negative, and lround is a call
    out[token] = static_cast<std::uint16_t>(static_cast<int>(n_steps + 0.5f));
  }
}

PositionResult compare(const float* logits, const ReferenceRows& reference, std::size_t row,
                       std::int32_t target) {
  const std::size_t n_vocab = reference.n_vocab();
  ZC_CHECK(target >= 0 && std::size_t(target) < n_vocab);
  const std::size_t top = first_largest(logits, n_vocab);
  const float normalizer = logits[top] + log_sum_exp(logits, n_vocab, logits[top]);
  PositionResult result;
  result.nll = normalizer - logits[target];
  result.nll_base = -reference.log_prob(row, static_cast<std::size_t>(target));

  const std::uint16_t* steps = reference.steps(row);
  double kld = 0;
  for (std::size_t token = 0; token < n_vocab; ++token) {
    const float base = reference.log_prob_of(row, steps[token]);
    const float term = std::exp(base) * (base - logits[token] + normalizer);
    kld += base > -kNatsKept ? term : 0.0f;
  }
  result.kld = static_cast<float>(kld);
  result.p_diff = std::exp(-result.nll) - std::exp(-result.nll_base);
  result.same_top = top == first_largest(steps, n_vocab);
  return result;
}

DivergenceSummary summarize(std::span<const PositionResult> positions) {
  ZC_CHECK(!positions.empty());
  const auto column = [&](auto&& value) {
    std::vector<double> values;
    for (const PositionResult& position : positions) {
      values.push_back(value(position));
    }
    return values;
  };
  const auto sorted = [](const std::vector<double>& values) {
    std::vector<float> floats(values.begin(), values.end());
    std::sort(floats.begin(), floats.end());
    return floats;
  };
  const std::vector<double> nll = column([](const auto& p) { return p.nll; });
  const std::vector<double> nll_base = column([](const auto& p) { return p.nll_base; });
  const std::vector<double> kld = column([](const auto& p) { return p.kld; });
  const std::vector<double> p_diff = column([](const auto& p) { return p.p_diff; });
  const std::vector<double> squared = column([](const auto& p) { return p.p_diff * p.p_diff; });
  const std::vector<double> same_top = column([](const auto& p) { return p.same_top ? 1.0 : 0.0; });

  DivergenceSummary s;
  s.n = positions.size();
  const Estimate ln = estimate_mean(nll), ln_base = estimate_mean(nll_base);
  const double covariance = mean_covariance(nll, nll_base);
  const auto difference_error = [&](double a, double b, double ab) {
    return std::sqrt(std::max(0.0, a * a + b * b - 2 * ab));
  };
  s.ppl = {std::exp(ln.mean), std::exp(ln.mean) * ln.error};
  s.ppl_base = {std::exp(ln_base.mean), std::exp(ln_base.mean) * ln_base.error};
  s.ln_ppl_correlation =
      ln.error > 0 && ln_base.error > 0 ? covariance / (ln.error * ln_base.error) : 0;
  s.ln_ppl_ratio = {ln.mean - ln_base.mean, difference_error(ln.error, ln_base.error, covariance)};
  s.ppl_ratio.mean = std::exp(s.ln_ppl_ratio.mean);
  s.ppl_ratio.error = s.ppl_ratio.mean * s.ln_ppl_ratio.error;
  s.ppl_difference = {
      s.ppl.mean - s.ppl_base.mean,
      difference_error(s.ppl.error, s.ppl_base.error, s.ppl.mean * s.ppl_base.mean * covariance)};
  s.kld = estimate_mean(kld);
  s.sorted_kld = sorted(kld);
  s.p_diff = estimate_mean(p_diff);
  s.sorted_p_diff = sorted(p_diff);
  const Estimate mean_squared = estimate_mean(squared);
  s.p_diff_rms.mean = std::sqrt(mean_squared.mean);
  s.p_diff_rms.error = s.p_diff_rms.mean > 0 ? 0.5 / s.p_diff_rms.mean * mean_squared.error : 0;
  const double share = estimate_mean(same_top).mean;
  s.same_top = {share, s.n > 1 ? std::sqrt(share * (1 - share) / double(s.n - 1)) : 0};
  return s;
}

std::string to_text(const DivergenceSummary& s) {
  const auto line = [](const char* label, const Estimate& value) {
    return fmt::format("{}: {:10.6f} ± {:10.6f}\n", label, value.mean, value.error);
  };
  const auto kld = [&](const char* label, double fraction) {
    return fmt::format("{} KLD: {:10.6f}\n", label, percentile(s.sorted_kld, fraction));
  };
  const auto p_diff = [&](const char* label, double fraction) {
    return fmt::format("{} Δp: {:6.3f}%\n", label, 100 * percentile(s.sorted_p_diff, fraction));
  };
  std::string text = "====== Perplexity statistics ======\n";
  text += line("Mean PPL(Q)                   ", s.ppl);
  text += line("Mean PPL(base)                ", s.ppl_base);
  text += fmt::format("Cor(ln(PPL(Q)), ln(PPL(base))): {:6.2f}%\n", 100 * s.ln_ppl_correlation);
  text += line("Mean ln(PPL(Q)/PPL(base))     ", s.ln_ppl_ratio);
  text += line("Mean PPL(Q)/PPL(base)         ", s.ppl_ratio);
  text += line("Mean PPL(Q)-PPL(base)         ", s.ppl_difference);
  text += "\n====== KL divergence statistics ======\n";
  text += line("Mean    KLD", s.kld);
  text += kld("Maximum", 1);
  text += kld("99.9%  ", 0.999);
  text += kld("99.0%  ", 0.99);
  text += kld("95.0%  ", 0.95);
  text += kld("90.0%  ", 0.9);
  text += kld("Median ", 0.5);
  text += kld("10.0%  ", 0.1);
  text += kld(" 5.0%  ", 0.05);
  text += kld(" 1.0%  ", 0.01);
  text += kld(" 0.1%  ", 0.001);
  text += kld("Minimum", 0);
  text += "\n====== Token probability statistics ======\n";
  text +=
      fmt::format("Mean    Δp: {:6.3f} ± {:5.3f} %\n", 100 * s.p_diff.mean, 100 * s.p_diff.error);
  text += p_diff("Maximum", 1);
  text += p_diff("99.9%  ", 0.999);
  text += p_diff("99.0%  ", 0.99);
  text += p_diff("95.0%  ", 0.95);
  text += p_diff("90.0%  ", 0.9);
  text += p_diff("75.0%  ", 0.75);
  text += p_diff("Median ", 0.5);
  text += p_diff("25.0%  ", 0.25);
  text += p_diff("10.0%  ", 0.1);
  text += p_diff(" 5.0%  ", 0.05);
  text += p_diff(" 1.0%  ", 0.01);
  text += p_diff(" 0.1%  ", 0.001);
  text += p_diff("Minimum", 0);
  text += fmt::format("RMS Δp    : {:6.3f} ± {:5.3f} %\n", 100 * s.p_diff_rms.mean,
                      100 * s.p_diff_rms.error);
  text += fmt::format("Same top p: {:6.3f} ± {:5.3f} %\n", 100 * s.same_top.mean,
                      100 * s.same_top.error);
  return text;
}

}  // namespace zipcache::eval
