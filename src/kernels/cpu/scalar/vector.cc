// Element-wise kernels and reductions over rows of scores, in plain loops.
#include <cmath>
#include <limits>

#include "kernels/cpu/scalar/scalar.h"

namespace zipcache::kernels::scalar {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

void mask(float* s, std::size_t n, const std::uint64_t* visible) {
  for (std::size_t i = 0; i < n; ++i) {
    if ((visible[i / 64] >> i % 64 & 1u) == 0) {
      s[i] = -kInfinity;
    }
  }
}

float max(const float* s, std::size_t n) {
  float top = -kInfinity;
  for (std::size_t i = 0; i < n; ++i) {
    top = s[i] > top ? s[i] : top;
  }
  return top;
}

float exp2_sum(float* s, std::size_t n, float m) {
  float sum = 0.0f;
  for (std::size_t i = 0; i < n; ++i) {
    s[i] = m == -kInfinity ? 0.0f : std::exp2(s[i] - m);
    sum += s[i];
  }
  return sum;
}

void axpby(float* y, std::size_t n, float a, const float* x, float b) {
  for (std::size_t i = 0; i < n; ++i) {
    y[i] = a * y[i] + b * x[i];
  }
}

void multiply(float* y, const float* x, const float* w, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    y[i] = x[i] * w[i];
  }
}

float dot(const float* x, const float* w, std::size_t n) {
  float sum = 0.0f;
  for (std::size_t i = 0; i < n; ++i) {
    sum += x[i] * w[i];
  }
  return sum;
}

}  // namespace zipcache::kernels::scalar
