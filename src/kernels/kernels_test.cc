// Every table that this machine can run against the formulas of ref/. Operands end at an unmapped
// page, so that one byte read or written beyond them is a crash; results are bracketed by poison.
#include "kernels/kernels.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/aligned.h"
#include "base/half.h"
#include "format/code_matrix.h"
#include "kernels/cpu/features.h"
#include "ref/matmul_ref.h"

namespace zipcache::kernels {

#if defined(ZIPCACHE_KERNELS_X86)
namespace avxvnni {
extern const KernelTable kEvexTable;
}
#endif

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kPoison = -7.25e33f;
constexpr double kFloatEpsilon = 0x1p-24;
constexpr std::size_t kMaxRows = 64;
// "avxvnni_evex": the table of "avxvnni" in the encoding of AVX-512 (cpu/avxvnni/evex_table.cc).
const std::string kTables[] = {"scalar", "avx2", "avxvnni", "avxvnni_evex", "avx512"};

// `n` elements whose end is the end of the last mapped page. Starts at any multiple of sizeof(T).
template <typename T>
class GuardedArray {
 public:
  GuardedArray(std::size_t n, T fill) : n_(n) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_bytes_ = round_up(n * sizeof(T) + 1, page) + page;
    base_ = static_cast<std::byte*>(
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + mapped_bytes_ - page, page, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<T*>(base_ + mapped_bytes_ - page - n * sizeof(T));
    std::fill_n(data_, n, fill);
  }
  ~GuardedArray() { munmap(base_, mapped_bytes_); }
  GuardedArray(const GuardedArray&) = delete;
  GuardedArray& operator=(const GuardedArray&) = delete;

  T* data() { return data_; }
  T& operator[](std::size_t i) { return data_[i]; }
  std::size_t size() const { return n_; }
  void assign(const std::vector<T>& values) { std::copy(values.begin(), values.end(), data_); }

 private:
  std::size_t n_;
  std::size_t mapped_bytes_ = 0;
  std::byte* base_ = nullptr;
  T* data_ = nullptr;
};

const KernelTable* find_table(const std::string& isa) {
#if defined(ZIPCACHE_KERNELS_X86)
  if (isa == "avxvnni_evex") {
    return missing_for_avx512().empty() ? &avxvnni::kEvexTable : nullptr;
  }
#endif
  const Expected<const KernelTable*> table = select_kernels(isa);
  return table ? *table : nullptr;
}

bool same_bits(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// Rows of very different shapes, so that none may leak into another: plain, one large outlier,
// alternating extremes, zeros, tiny, huge.
void fill_row(std::size_t row, std::mt19937& rng, float* x, std::size_t n) {
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < n; ++i) {
    const float value = normal(rng);
    switch (row % 6) {
      case 0:
        x[i] = value;
        break;
      case 1:
        x[i] = i == n / 2 ? 1000.0f : value;
        break;
      case 2:
        x[i] = i % 2 == 0 ? 3.0f : -3.0f;
        break;
      case 3:
        x[i] = 0.0f;
        break;
      case 4:
        x[i] = value * 1e-30f;
        break;
      default:
        x[i] = value * 1e30f;
    }
  }
}

float max_magnitude(const float* x, std::size_t n) {
  float top = 0.0f;
  for (std::size_t i = 0; i < n; ++i) {
    top = std::max(top, std::fabs(x[i]));
  }
  return top;
}

// Bound of |y - ref| for one element.
//   fp32 sums of n terms: gamma_n * sum |x m|.
//   16-bit fixed point: half a step (max|x| / 32639) per unit of code; the sum itself is exact, and
//   the conversions, the scale and at most n / 256 flushes round 8 times or less each.
double tolerance(const std::string& isa, int bits, std::size_t inner, float top,
                 const ref::Product& product) {
  const double n = static_cast<double>(inner) + 1;
  const double underflow = n * 0x1p-126;
  if (bits == 16 || isa == "scalar") {
    return n * kFloatEpsilon / (1 - n * kFloatEpsilon) * product.magnitude + underflow;
  }
  const double half_step = 0.5 * 1.001 * static_cast<double>(top) / 32639;
  const double roundings = 8 + n / 256;
  return half_step * product.weight +
         roundings * kFloatEpsilon * (product.magnitude + half_step * product.weight) +
         underflow * product.weight;
}

struct MatrixCase {
  std::size_t lanes = 0;
  std::size_t inner = 0;
  std::size_t half_stride = 0;
};

// A random matrix in memory as a caller would hold it.
class TestMatrix {
 public:
  TestMatrix(int bits, const MatrixCase& shape, std::mt19937& rng)
      : bits_(bits),
        shape_(shape),
        bytes_(
            bits == 16 ? half_bytes(shape) : format::matrix_bytes(bits, shape.lanes, shape.inner),
            std::byte{0xcd}) {
    if (bits == 16) {
      fill_halves(rng);
    } else {
      fill_codes(rng);
    }
  }

  MatrixView view() {
    return {bytes_.data(), bits_, static_cast<std::uint32_t>(shape_.lanes),
            static_cast<std::uint32_t>(shape_.inner),
            static_cast<std::uint32_t>(shape_.half_stride)};
  }
  ref::Matrix ref() {
    return {bytes_.data(), bits_, shape_.lanes, shape_.inner, shape_.half_stride};
  }
  Half* halves() { return reinterpret_cast<Half*>(bytes_.data()); }

 private:
  // The last row ends with its last lane: nothing may be read beyond.
  static std::size_t half_bytes(const MatrixCase& shape) {
    return shape.inner == 0 ? 0 : ((shape.inner - 1) * shape.half_stride + shape.lanes) * 2;
  }
  void fill_halves(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < bytes_.size() / 2; ++i) {
      halves()[i] = float_to_half(kNan);  // between the lanes of two rows
    }
    for (std::size_t i = 0; i < shape_.inner; ++i) {
      for (std::size_t lane = 0; lane < shape_.lanes; ++lane) {
        const float value = normal(rng) * (lane % 5 == 0 ? 1e-5f : 1.0f);  // subnormals too
        halves()[i * shape_.half_stride + lane] = float_to_half(value);
      }
    }
  }
  void fill_codes(std::mt19937& rng) {
    std::vector<std::uint8_t> codes(shape_.lanes * shape_.inner);
    for (std::uint8_t& code : codes) {
      code = static_cast<std::uint8_t>(rng() & ((1u << bits_) - 1));
    }
    format::pack_codes(bits_, shape_.lanes, shape_.inner, codes, {bytes_.data(), bytes_.size()});
  }

  int bits_;
  MatrixCase shape_;
  GuardedArray<std::byte> bytes_;
};

// x as callers hold it: zeros up to the padded inner size, NaN where nobody may look.
struct TestRows {
  TestRows(int bits, std::size_t inner, std::size_t n_rows)
      : padded(bits == 16 ? inner : format::padded_inner(bits, inner)),
        stride(padded + 3),
        x(n_rows == 0 ? 0 : (n_rows - 1) * stride + padded, kNan) {
    for (std::size_t row = 0; row < n_rows; ++row) {
      std::fill_n(x.data() + row * stride, padded, 0.0f);
    }
  }
  std::size_t padded;
  std::size_t stride;
  GuardedArray<float> x;
};

// Calls matmul for rows [first, first + n_rows) and checks the poison around the results.
std::vector<float> run_matmul(const KernelTable& table, TestMatrix& m, TestRows& rows,
                              std::size_t first, std::size_t n_rows) {
  const MatrixView view = m.view();
  const std::size_t width = round_up(view.lanes, 16);
  const std::size_t y_stride = width + 5;
  const std::size_t y_size = n_rows == 0 ? 0 : (n_rows - 1) * y_stride + width;
  GuardedArray<float> y(7 + y_size, kPoison);
  const std::size_t scratch_bytes = matmul_scratch_bytes(n_rows, view.inner);
  AlignedVector<std::byte> scratch(scratch_bytes + 64, std::byte{0xff});
  std::fill(scratch.end() - 64, scratch.end(), std::byte{0x5a});
  table.matmul(view, rows.x.data() + first * rows.stride, rows.stride, n_rows, y.data() + 7,
               y_stride, {scratch.data(), scratch_bytes});

  EXPECT_TRUE(std::all_of(scratch.end() - 64, scratch.end(),
                          [](std::byte b) { return b == std::byte{0x5a}; }));
  std::vector<float> result(n_rows * view.lanes);
  for (std::size_t i = 0; i < 7; ++i) {
    EXPECT_EQ(y[i], kPoison);
  }
  for (std::size_t row = 0; row < n_rows; ++row) {
    std::copy_n(y.data() + 7 + row * y_stride, view.lanes, result.data() + row * view.lanes);
    for (std::size_t i = width; i < y_stride && row + 1 < n_rows; ++i) {
      EXPECT_EQ(y[7 + row * y_stride + i], kPoison) << "row " << row << " beyond lane " << i;
    }
  }
  return result;
}

class MatmulTest : public testing::TestWithParam<std::tuple<std::string, int>> {
 protected:
  void SetUp() override {
    table_ = find_table(isa());
    if (table_ == nullptr) {
      GTEST_SKIP() << "this machine can't run " << isa();
    }
  }
  const std::string& isa() const { return std::get<0>(GetParam()); }
  int bits() const { return std::get<1>(GetParam()); }

  void expect_close(TestMatrix& m, TestRows& rows, std::size_t n_rows) {
    const ref::Matrix reference = m.ref();
    const std::vector<float> y = run_matmul(*table_, m, rows, 0, n_rows);
    const std::vector<ref::Product> expected =
        ref::matmul(reference, rows.x.data(), rows.stride, n_rows);
    for (std::size_t row = 0; row < n_rows; ++row) {
      const float top = max_magnitude(rows.x.data() + row * rows.stride, reference.inner);
      for (std::size_t lane = 0; lane < reference.lanes; ++lane) {
        const ref::Product& product = expected[row * reference.lanes + lane];
        const double error =
            std::fabs(static_cast<double>(y[row * reference.lanes + lane]) - product.value);
        ASSERT_LE(error, tolerance(isa(), bits(), reference.inner, top, product))
            << "row " << row << " lane " << lane << " of " << reference.lanes << " inner "
            << reference.inner << " expected " << product.value;
      }
    }
  }

  const KernelTable* table_ = nullptr;
};

TEST_P(MatmulTest, EqualsTheFormulaAndRowsAreIndependent) {
  std::mt19937 rng(20240501);
  for (const std::size_t lanes : {0, 1, 15, 16, 17, 31, 32, 48, 64, 80, 256}) {
    for (const std::size_t inner : {0, 1, 3, 4, 31, 32, 33, 64, 80, 96, 100, 128, 256}) {
      const std::size_t half_stride = lanes + inner % 2 * 3;
      TestMatrix m(bits(), {lanes, inner, half_stride}, rng);
      TestRows rows(bits(), inner, kMaxRows);
      for (std::size_t row = 0; row < kMaxRows; ++row) {
        fill_row(row, rng, rows.x.data() + row * rows.stride, inner);
      }
      ASSERT_NO_FATAL_FAILURE(expect_close(m, rows, kMaxRows));

      const std::vector<float> all = run_matmul(*table_, m, rows, 0, kMaxRows);
      for (const std::size_t n_rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17}) {
        const std::size_t first = (kMaxRows - n_rows) / 2;
        const std::vector<float> some = run_matmul(*table_, m, rows, first, n_rows);
        for (std::size_t i = 0; i < some.size(); ++i) {
          ASSERT_TRUE(same_bits(some[i], all[first * lanes + i]))
              << n_rows << " rows, element " << i << ", lanes " << lanes << ", inner " << inner;
        }
      }
    }
  }
}

// The integer accumulators of the code kernels hold about 2^31; a long sum of the largest codes
// passes that unless they are flushed in time.
TEST_P(MatmulTest, LongSumsOfLargestCodesDoNotOverflow) {
  constexpr std::size_t kInner = 70000;
  constexpr std::size_t kLanes = 16;
  std::mt19937 rng(7);
  TestMatrix m(bits(), {kLanes, kInner, kLanes}, rng);
  if (bits() == 16) {
    std::fill_n(m.halves(), kLanes * kInner, float_to_half(255.0f));
  } else {
    std::memset(const_cast<void*>(m.view().data), 0xff,
                format::matrix_bytes(bits(), kLanes, kInner));
  }
  TestRows rows(bits(), kInner, 3);
  std::fill_n(rows.x.data(), kInner, 2.5f);
  std::fill_n(rows.x.data() + rows.stride, kInner, -0.125f);
  fill_row(1, rng, rows.x.data() + 2 * rows.stride, kInner);
  expect_close(m, rows, 3);
}

TEST_P(MatmulTest, NotANumberAndInfinityStayInTheirRow) {
  std::mt19937 rng(11);
  constexpr std::size_t kRows = 9;
  for (const std::size_t inner : {1, 33, 100}) {
    for (const float bad : {kNan, -kNan, kInfinity, -kInfinity}) {
      TestMatrix m(bits(), {37, inner, 37}, rng);
      TestRows rows(bits(), inner, kRows);
      for (std::size_t row = 0; row < kRows; ++row) {
        fill_row(0, rng, rows.x.data() + row * rows.stride, inner);
      }
      const std::vector<float> clean = run_matmul(*table_, m, rows, 0, kRows);
      const std::size_t bad_row = inner % kRows;
      rows.x[bad_row * rows.stride + inner / 2] = bad;
      const std::vector<float> y = run_matmul(*table_, m, rows, 0, kRows);
      for (std::size_t i = 0; i < y.size(); ++i) {
        if (i / 37 != bad_row) {
          ASSERT_TRUE(same_bits(y[i], clean[i])) << "row " << i / 37;
        } else if (std::isnan(bad)) {
          ASSERT_TRUE(std::isnan(y[i]));
        } else if (bits() == 16) {
          ASSERT_FALSE(std::isfinite(y[i]));
        } else {  // infinity times code 0 is NaN, times any other code infinity
          const bool zero = ref::matrix_element(m.ref(), inner / 2, i % 37) == 0;
          ASSERT_TRUE(std::isnan(y[i]) || (!zero && y[i] == bad)) << y[i];
        }
      }
    }
  }
}

TEST_P(MatmulTest, ExtremeRowsStayFiniteAndAccurate) {
  std::mt19937 rng(13);
  for (const float scale :
       {0x1p-149f, 0x1p-126f, 0x1p-116f, 0x1p-112f, 0x1p-110f, 0x1p100f, 0x1p110f}) {
    TestMatrix m(bits(), {48, 64, 48}, rng);
    TestRows rows(bits(), 64, 2);
    for (std::size_t row = 0; row < 2; ++row) {
      fill_row(0, rng, rows.x.data() + row * rows.stride, 64);
      for (std::size_t i = 0; i < 64; ++i) {
        rows.x[row * rows.stride + i] *= scale;
      }
    }
    ASSERT_NO_FATAL_FAILURE(expect_close(m, rows, 2)) << scale;
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, MatmulTest,
                         testing::Combine(testing::ValuesIn(kTables),
                                          testing::Values(2, 3, 4, 8, 16)),
                         [](const auto& param_info) {
                           return std::get<0>(param_info.param) + "_" +
                                  std::to_string(std::get<1>(param_info.param)) + "bit";
                         });

constexpr std::size_t kSizes[] = {0,  1,  7,  8,  9,  15,  16,  17,  31,
                                  32, 33, 63, 64, 65, 100, 256, 1000};

class TableTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    table_ = find_table(GetParam());
    if (table_ == nullptr) {
      GTEST_SKIP() << "this machine can't run " << GetParam();
    }
  }
  std::vector<float> random(std::size_t n, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(n);
    std::generate(values.begin(), values.end(), [&] { return normal(rng_); });
    return values;
  }

  std::mt19937 rng_{99};
  const KernelTable* table_ = nullptr;
};

TEST_P(TableTest, MaskHidesExactlyTheInvisible) {
  for (const std::size_t n : kSizes) {
    GuardedArray<std::uint64_t> visible((n + 63) / 64, 0);
    for (std::size_t word = 0; word < visible.size(); ++word) {
      visible[word] = std::uint64_t{rng_()} << 32 | rng_();
    }
    const std::vector<float> before = random(n);
    GuardedArray<float> s(n, 0.0f);
    s.assign(before);
    table_->mask(s.data(), n, visible.data());
    for (std::size_t i = 0; i < n; ++i) {
      const bool is_visible = (visible[i / 64] >> i % 64 & 1) != 0;
      EXPECT_EQ(s[i], is_visible ? before[i] : -kInfinity) << i << " of " << n;
    }
  }
}

TEST_P(TableTest, MaxFindsTheLargestAnywhere) {
  EXPECT_EQ(table_->max(nullptr, 0), -kInfinity);
  for (const std::size_t n : kSizes) {
    if (n == 0) {
      continue;
    }
    GuardedArray<float> s(n, 0.0f);
    for (std::size_t place = 0; place<n; place += n> 100 ? 37 : 1) {
      s.assign(random(n));
      s[place] = 50.0f;
      EXPECT_EQ(table_->max(s.data(), n), 50.0f) << place << " of " << n;
      // A NaN hides nothing, least of all one that follows in the same vector lane.
      for (const std::size_t distance : {1, 8, 16, 32, 64}) {
        if ((place + distance) % n != place) {
          s[(place + distance) % n] = kNan;
        }
      }
      EXPECT_EQ(table_->max(s.data(), n), 50.0f) << place << " of " << n;
    }
    std::fill_n(s.data(), n, -kInfinity);
    EXPECT_EQ(table_->max(s.data(), n), -kInfinity);
    std::fill_n(s.data(), n, -3e38f);
    EXPECT_EQ(table_->max(s.data(), n), -3e38f);
  }
}

TEST_P(TableTest, Exp2SumEqualsTheFormula) {
  for (const std::size_t n : kSizes) {
    for (const float scale : {0.5f, 8.0f, 60.0f}) {
      GuardedArray<float> s(n, 0.0f);
      s.assign(random(n, scale));
      if (n > 4) {
        s[n / 3] = -kInfinity;
        s[n / 2] = -1e30f;
      }
      const float m = table_->max(s.data(), n);
      std::vector<double> expected(n);
      const double expected_sum = ref::exp2_sum(s.data(), n, m, expected.data());
      const float sum = table_->exp2_sum(s.data(), n, m);
      for (std::size_t i = 0; i < n; ++i) {
        // Results below 2^-126 may be flushed to 0.
        const double bound =
            expected[i] >= 0x1p-120 ? 2e-7 * expected[i] : std::max(0x1p-126, 4e-7 * expected[i]);
        EXPECT_LE(std::fabs(static_cast<double>(s[i]) - expected[i]), bound) << expected[i];
      }
      EXPECT_LE(std::fabs(static_cast<double>(sum) - expected_sum),
                (2e-7 + kFloatEpsilon * static_cast<double>(n)) * expected_sum);
      if (n > 4) {
        EXPECT_EQ(s[n / 3], 0.0f);
        EXPECT_EQ(s[n / 2], 0.0f);
      }
    }
  }
}

TEST_P(TableTest, Exp2SumIsAccurateOverItsWholeRange) {
  std::vector<float> s;
  for (float t = -130.0f; t <= 127.9f; t += 0.00731f) {
    s.push_back(t);
  }
  std::vector<double> expected(s.size());
  ref::exp2_sum(s.data(), s.size(), 0.0f, expected.data());
  table_->exp2_sum(s.data(), s.size(), 0.0f);
  for (std::size_t i = 0; i < s.size(); ++i) {
    const double bound = expected[i] >= 0x1p-120 ? 2e-7 * expected[i] : 0x1p-126;
    ASSERT_LE(std::fabs(static_cast<double>(s[i]) - expected[i]), bound) << expected[i];
  }
}

TEST_P(TableTest, Exp2SumOfSpecialValues) {
  for (const std::size_t n : {1, 8, 16, 21, 40}) {
    std::vector<float> s(n, 3.0f);
    EXPECT_EQ(table_->exp2_sum(s.data(), n, 3.0f), static_cast<float>(n));
    EXPECT_TRUE(std::all_of(s.begin(), s.end(), [](float p) { return p == 1.0f; }));

    s = random(n);  // no visible key: nothing weighs anything
    EXPECT_EQ(table_->exp2_sum(s.data(), n, -kInfinity), 0.0f);
    EXPECT_TRUE(std::all_of(s.begin(), s.end(), [](float p) { return same_bits(p, 0.0f); }));

    s.assign(n, -kInfinity);
    EXPECT_EQ(table_->exp2_sum(s.data(), n, -kInfinity), 0.0f);
    EXPECT_TRUE(std::all_of(s.begin(), s.end(), [](float p) { return same_bits(p, 0.0f); }));

    s.assign(n, -kInfinity);
    EXPECT_EQ(table_->exp2_sum(s.data(), n, -1e30f), 0.0f);

    s.assign(n, 1.0f);
    s[n - 1] = kNan;
    EXPECT_TRUE(std::isnan(table_->exp2_sum(s.data(), n, 1.0f)));
    EXPECT_TRUE(std::isnan(s[n - 1]));
    EXPECT_TRUE(n == 1 || s[0] == 1.0f);

    s.assign(n, 1.0f);
    s[0] = kInfinity;
    EXPECT_EQ(table_->exp2_sum(s.data(), n, 1.0f), kInfinity);
    s.assign(n, 200.0f);
    EXPECT_EQ(table_->exp2_sum(s.data(), n, 0.0f), kInfinity);
  }
}

TEST_P(TableTest, LinearKernelsEqualTheFormula) {
  for (const std::size_t n : kSizes) {
    GuardedArray<float> x(n, 0.0f);
    GuardedArray<float> w(n, 0.0f);
    GuardedArray<float> y(n, 0.0f);
    const std::vector<float> before = random(n);
    x.assign(random(n));
    w.assign(random(n));

    y.assign(before);
    table_->axpby(y.data(), n, 0.75f, x.data(), -1.5f);
    for (std::size_t i = 0; i < n; ++i) {
      const double expected =
          0.75 * static_cast<double>(before[i]) - 1.5 * static_cast<double>(x[i]);
      const double size = std::fabs(0.75 * before[i]) + std::fabs(1.5 * x[i]);
      EXPECT_LE(std::fabs(y[i] - expected), 3 * kFloatEpsilon * size);
    }

    table_->multiply(y.data(), x.data(), w.data(), n);
    double sum = 0;
    double magnitude = 0;
    for (std::size_t i = 0; i < n; ++i) {
      EXPECT_EQ(y[i], x[i] * w[i]);
      sum += static_cast<double>(x[i]) * static_cast<double>(w[i]);
      magnitude += std::fabs(static_cast<double>(x[i]) * static_cast<double>(w[i]));
    }
    EXPECT_LE(std::fabs(static_cast<double>(table_->dot(x.data(), w.data(), n)) - sum),
              static_cast<double>(n) * kFloatEpsilon * 1.01 * magnitude);

    const std::vector<float> product(y.data(), y.data() + n);
    table_->multiply(x.data(), x.data(), w.data(), n);  // in place
    EXPECT_TRUE(std::equal(product.begin(), product.end(), x.data()));
  }
}

TEST_P(TableTest, NotANumberInAnFp16MatrixStaysInItsLane) {
  TestMatrix m(16, {37, 20, 40}, rng_);
  m.halves()[3 * 40 + 5] = float_to_half(kNan);
  m.halves()[9 * 40 + 36] = float_to_half(kInfinity);
  TestRows rows(16, 20, 4);
  for (std::size_t row = 0; row < 4; ++row) {
    fill_row(0, rng_, rows.x.data() + row * rows.stride, 20);
  }
  const std::vector<float> y = run_matmul(*table_, m, rows, 0, 4);
  for (std::size_t i = 0; i < y.size(); ++i) {
    EXPECT_EQ(std::isnan(y[i]), i % 37 == 5) << i;
    EXPECT_EQ(std::isinf(y[i]), i % 37 == 36) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, TableTest, testing::ValuesIn(kTables),
                         [](const auto& param_info) { return param_info.param; });

TEST(SelectKernelsTest, PicksTheBestOrTheOneAskedFor) {
  const Expected<const KernelTable*> best = select_kernels("");
  ASSERT_TRUE(best);
  EXPECT_TRUE(select_kernels((*best)->isa));
  const Expected<const KernelTable*> scalar = select_kernels("scalar");
  ASSERT_TRUE(scalar);
  EXPECT_STREQ((*scalar)->isa, "scalar");
}

TEST(SelectKernelsTest, AnUnknownNameIsAnErrorThatSaysWhatThereIs) {
  const Expected<const KernelTable*> table = select_kernels("sse9");
  ASSERT_FALSE(table);
  EXPECT_EQ(table.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(table.error().message.find("sse9"), std::string::npos) << table.error().message;
  EXPECT_NE(table.error().message.find("scalar"), std::string::npos) << table.error().message;
}

}  // namespace
}  // namespace zipcache::kernels
