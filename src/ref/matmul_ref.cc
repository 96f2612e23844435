#include "ref/matmul_ref.h"

#include <cmath>
#include <cstdint>
#include <limits>

namespace zipcache::ref {
namespace {

constexpr std::size_t kLanes = 16;

// Bit number `bit` of lane group `group`, counted within 32-bit word `word` of `lane`; words are
// little endian, so bytes are taken in place.
unsigned bit_at(const std::uint8_t* group, std::size_t word, std::size_t lane, std::size_t bit) {
  const std::uint8_t byte = group[(word * kLanes + lane) * 4 + bit / 8];
  return byte / (1u << bit % 8) % 2u;
}

// The p-bit number of inner position i: i = word * (32 / p) + 4 * j + byte, at bit 8 * byte + p *
// j.
unsigned plane_element(const std::uint8_t* plane, std::size_t p, std::size_t i, std::size_t lane) {
  const std::size_t word = i / (32 / p);
  const std::size_t j = i % (32 / p) / 4;
  const std::size_t byte = i % 4;
  unsigned element = 0;
  for (std::size_t k = 0; k < p; ++k) {
    element += bit_at(plane, word, lane, 8 * byte + p * j + k) << k;
  }
  return element;
}

std::size_t plane_bytes(std::size_t p, std::size_t inner) {
  const std::size_t per_word = 32 / p;
  return (inner + per_word - 1) / per_word * kLanes * 4;
}

double half_value(std::uint16_t h) {
  const int exponent = h >> 10 & 31;
  const int mantissa = h & 1023;
  const double sign = (h >> 15) != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

}  // namespace

double matrix_element(const Matrix& m, std::size_t i, std::size_t lane) {
  if (m.bits == 16) {
    return half_value(static_cast<const std::uint16_t*>(m.data)[i * m.half_stride + lane]);
  }
  const auto* const bytes = static_cast<const std::uint8_t*>(m.data);
  const std::size_t group = lane / kLanes;
  if (m.bits == 3) {
    const std::uint8_t* const low =
        bytes + group * (plane_bytes(2, m.inner) + plane_bytes(1, m.inner));
    const std::uint8_t* const high = low + plane_bytes(2, m.inner);
    return plane_element(low, 2, i, lane % kLanes) + 4 * plane_element(high, 1, i, lane % kLanes);
  }
  const auto p = static_cast<std::size_t>(m.bits);
  return plane_element(bytes + group * plane_bytes(p, m.inner), p, i, lane % kLanes);
}

std::vector<Product> matmul(const Matrix& m, const float* x, std::size_t x_stride,
                            std::size_t n_rows) {
  std::vector<Product> products(n_rows * m.lanes);
  for (std::size_t i = 0; i < m.inner; ++i) {
    for (std::size_t lane = 0; lane < m.lanes; ++lane) {
      const double element = matrix_element(m, i, lane);
      for (std::size_t row = 0; row < n_rows; ++row) {
        Product& product = products[row * m.lanes + lane];
        const double term = static_cast<double>(x[row * x_stride + i]) * element;
        product.value += term;
        product.magnitude += std::fabs(term);
        product.weight += std::fabs(element);
      }
    }
  }
  return products;
}

double exp2_sum(const float* s, std::size_t n, float m, double* out) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const bool hidden = m == -std::numeric_limits<float>::infinity();
    const float difference = s[i] - m;
    out[i] = hidden ? 0.0 : std::exp2(static_cast<double>(difference));
    sum += out[i];
  }
  return sum;
}

}  // namespace zipcache::ref
