// How far a kernel's attention is from the formula in double, measured by the error of the usual
// fp16 path (keys, values and weights rounded to fp16, sums exact) on the same data.
#pragma once

#include <span>

#include "ref/attention_ref.h"

namespace zipcache::cuda {

class AttentionCheck {
 public:
  // One KV head: c.n_kv_heads is 1. `out`: [n_rows, n_heads, value_dim], `lse`: base 2, [n_rows,
  // n_heads]. Fails the test on what is not finite.
  void add(const ref::AttentionCase& c, std::span<const float> out, std::span<const float> lse);
  // Fails the test when what was added is too far off.
  void expect_close() const;

 private:
  double error_ = 0, naive_error_ = 0, size_ = 0, n_ = 0;  // sums of squares, elements
  double lse_error_ = 0, naive_lse_error_ = 0, query_error_ = 0;
};

}  // namespace zipcache::cuda
