// Softmax attention as its formula, in double, over float rows.
//
//   logit(row, head, token) = cap(scale * q . k) + slope[head] * bias[row][token]
//   cap(s) = softcap * tanh(s / softcap), or s when softcap is 0
//   weight = exp(logit - lse), lse = ln(sum over visible tokens of exp(logit) [+ exp(sink[head])])
//   out    = sum over visible tokens of weight * v
//
// Query head h reads key-value head h / (n_heads / n_kv_heads). Without a visible token the output
// is 0 and lse is the sink, or -infinity without sinks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace zipcache::ref {

struct AttentionCase {
  std::size_t n_rows = 0;
  std::size_t n_heads = 0;
  std::size_t n_tokens = 0;
  std::size_t n_kv_heads = 0;
  std::size_t key_dim = 0;
  std::size_t value_dim = 0;
  std::span<const float> q;               // [n_rows][n_heads][key_dim]
  std::span<const float> k;               // [n_tokens][n_kv_heads][key_dim]
  std::span<const float> v;               // [n_tokens][n_kv_heads][value_dim]
  std::span<const std::uint8_t> visible;  // [n_rows][n_tokens], 0 = hidden; empty: all visible
  double scale = 1;
  double softcap = 0;
  std::span<const float> sinks;   // [n_heads], a logit without a value; may be empty
  std::span<const float> bias;    // [n_rows][n_tokens]; may be empty
  std::span<const float> slopes;  // [n_heads]; empty: 1
};

struct AttentionResult {
  std::vector<double> out;      // [n_rows][n_heads][value_dim]
  std::vector<double> lse;      // [n_rows][n_heads], natural logarithm
  std::vector<double> weights;  // [n_rows][n_heads][n_tokens]; empty unless asked for
};

AttentionResult attention(const AttentionCase& c, bool with_weights = false);

// [n_rows][n_tokens]: row r sees the tokens up to first_position + r.
std::vector<std::uint8_t> causal_mask(std::size_t n_rows, std::size_t n_tokens,
                                      std::size_t first_position);

}  // namespace zipcache::ref
