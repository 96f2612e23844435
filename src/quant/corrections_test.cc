// Low-rank terms and outliers against their formulas, and what they are for: less error.
#include "quant/corrections.h"

#include <gtest/gtest.h>

#include <cmath>

#include "quant/codec_test_util.h"
#include "quant/low_rank.h"
#include "ref/low_rank_ref.h"
#include "ref/quant_ref.h"

namespace zipcache::quant {
namespace {

std::vector<double> product(const LowRank& factors, std::size_t rows, std::size_t columns) {
  std::vector<double> out(rows * columns);
  for (std::size_t at = 0; at < out.size(); ++at) {
    for (std::size_t r = 0; r < factors.token.size() / rows; ++r) {
      out[at] += double{factors.token[r * rows + at / columns]} *
                 factors.channel[r * columns + at % columns];
    }
  }
  return out;
}

TEST(LowRank, IsThePowerIterationOfTheReference) {
  for (const auto& [rows, columns, rank] :
       {std::tuple{1, 16, 1}, {3, 16, 2}, {64, 32, 4}, {200, 64, 4}, {33, 16, 7}}) {
    const auto x = lifelike_values(static_cast<std::size_t>(rows) * columns, columns, 5);
    const auto start = low_rank_start(columns, rank);
    const auto expected =
        ref::power_iteration(std::vector<double>(x.begin(), x.end()), rows, columns,
                             std::vector<double>(start.begin(), start.end()), rank, 3);
    const auto got = product(low_rank_factors(x, rows, columns, rank, 3), rows, columns);
    for (std::size_t at = 0; at < got.size(); ++at) {
      ASSERT_NEAR(got[at], expected[at], 1e-4) << rows << " " << rank << " at " << at;
    }
  }
}

TEST(LowRank, FindsAMatrixOfItsRankExactly) {
  constexpr std::size_t kRows = 40, kColumns = 32;
  std::vector<float> x(kRows * kColumns);
  const auto a = lifelike_values(2 * kRows, 16, 1), b = lifelike_values(2 * kColumns, 16, 2);
  for (std::size_t at = 0; at < x.size(); ++at) {
    for (std::size_t r = 0; r < 2; ++r) {
      x[at] += a[r * kRows + at / kColumns] * b[r * kColumns + at % kColumns];
    }
  }
  for (const std::size_t rank : {2u, 4u}) {  // and with more than it needs
    const auto got = product(low_rank_factors(x, kRows, kColumns, rank, 3), kRows, kColumns);
    for (std::size_t at = 0; at < got.size(); ++at) {
      ASSERT_NEAR(got[at], x[at], 1e-4);
    }
  }
  const LowRank none = low_rank_factors(x, kRows, kColumns, 0, 3);
  EXPECT_TRUE(none.token.empty() && none.channel.empty());
  const LowRank zero = low_rank_factors(std::vector<float>(64), 4, 16, 2, 3);
  EXPECT_EQ(zero.token, std::vector<float>(8));
}

BlockShape gear_shape(std::uint32_t n_tokens) {
  BlockShape s{n_tokens, 2, 32, 32, {}, {}};
  s.key.bits = s.value.bits = {2, 2};
  s.value.granularity = Granularity::kTokenwise;
  return s;
}

// Elements of a head, [token][channel].
std::vector<double> head_rows(const std::vector<float>& all, std::uint32_t head) {
  std::vector<double> rows;
  for (std::size_t token = 0; token < all.size() / 64; ++token) {
    rows.insert(rows.end(), &all[(token * 2 + head) * 32], &all[(token * 2 + head) * 32] + 32);
  }
  return rows;
}

double squared_error(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t at = 0; at < a.size(); ++at) {
    sum += std::pow(a[at] - b[at], 2);
  }
  return sum;
}

// X ~ Q(X - S) + L + S, with the reference's quantizers, outliers and term.
TEST(Corrections, AreThoseOfTheFormula) {
  for (const std::uint32_t n_tokens : {1u, 2u, 31u, 64u, 100u}) {
    BlockShape s = gear_shape(n_tokens);
    s.key.rank = s.value.rank = 2;
    s.key.outliers = static_cast<std::uint16_t>(std::min(n_tokens, 4u));
    s.value.outliers = 2;
    const CodecCase c = make_case(s, {}, false, n_tokens);
    const Encoded encoded(c);
    for (const Tensor t : kTensors) {
      const bool is_key = t == Tensor::kKey;
      for (std::uint32_t head = 0; head < 2; ++head) {
        const std::vector<double> x = head_rows(c.input(t), head);
        std::vector<double> replaced = x;
        std::vector<bool> is_outlier(x.size());
        const std::size_t n_vectors = is_key ? 32 : n_tokens, length = is_key ? n_tokens : 32;
        for (std::size_t v = 0; v < n_vectors; ++v) {
          const auto at = [&](std::size_t i) { return is_key ? i * 32 + v : v * 32 + i; };
          std::vector<double> vector;
          double mean = 0;
          for (std::size_t i = 0; i < length; ++i) {
            vector.push_back(x[at(i)]);
            mean += x[at(i)] / static_cast<double>(length);
          }
          for (const std::size_t i :
               ref::outlier_places(vector, encoded.layout().tensor(t).outliers)) {
            replaced[at(i)] = mean;
            is_outlier[at(i)] = true;
          }
        }
        const auto coded = is_key ? ref::channelwise(replaced, n_tokens, 32, 2).values
                                  : ref::tokenwise(replaced, n_tokens, 32, 2).values;
        std::vector<double> error(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) {
          error[i] = is_outlier[i] ? 0 : x[i] - coded[i];
        }
        const auto start = low_rank_start(32, 2);
        const auto term = ref::power_iteration(
            error, n_tokens, 32, std::vector<double>(start.begin(), start.end()), 2, 3);
        const std::vector<double> got = head_rows(encoded.decoded(t), head);
        double total = 0, distance = 0;
        for (std::size_t i = 0; i < x.size(); ++i) {
          const double expected = is_outlier[i] ? x[i] : coded[i] + term[i];
          if (is_outlier[i]) {
            ASSERT_NEAR(got[i], x[i], 1e-3 * (1 + std::abs(x[i]))) << i;
          }
          total += expected * expected;
          distance += std::pow(got[i] - expected, 2);
        }
        // fp16 scales and a code or two that round the other way.
        EXPECT_LE(distance, 2e-3 * total) << n_tokens << " tokens, head " << head << is_key;
      }
    }
  }
}

TEST(Corrections, LessErrorWithEach) {
  const auto error_of = [](std::uint8_t rank, std::uint16_t outliers) {
    BlockShape s = gear_shape(128);
    s.key.rank = s.value.rank = rank;
    s.key.outliers = s.value.outliers = outliers;
    const CodecCase c = make_case(s, {}, false, 3);
    const Encoded encoded(c);
    return std::pair{squared_error(encoded.decoded(Tensor::kKey), c.keys),
                     squared_error(encoded.decoded(Tensor::kValue), c.values)};
  };
  const auto plain = error_of(0, 0), low_rank = error_of(4, 0), both = error_of(4, 2);
  EXPECT_LT(low_rank.first, 0.95 * plain.first);
  EXPECT_LT(low_rank.second, 0.95 * plain.second);
  EXPECT_LT(both.first, 0.9 * low_rank.first);
  EXPECT_LT(both.second, 0.9 * low_rank.second);
}

TEST(Corrections, NanAndInfinityLeaveNoneBehind) {
  BlockShape s = gear_shape(20);
  s.key.rank = s.value.rank = 2;
  s.key.outliers = s.value.outliers = 2;
  CodecCase c = make_case(s, {}, false, 1);
  c.keys[5] = NAN;
  c.keys[70] = INFINITY;
  c.values[9] = -INFINITY;
  const Encoded encoded(c);
  EXPECT_TRUE(format::is_sound(encoded.layout(), encoded.bytes().data()));
  for (const Tensor t : kTensors) {
    for (const float x : encoded.decoded(t)) {
      ASSERT_TRUE(std::isfinite(x));
    }
  }
}

}  // namespace
}  // namespace zipcache::quant
