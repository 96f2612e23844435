// Eviction against a simulation of it: scores are sums of the weights that the formulas give.
#include <gtest/gtest.h>

#include "cache/sealer.h"
#include "cache/test_engine.h"

namespace zipcache::cache {
namespace {

// position -> accumulated attention of the tokens that one head still has.
using Scores = std::map<std::uint32_t, double>;

class Simulation {
 public:
  Simulation(const TestDims& dims, std::uint32_t heavy, std::uint32_t recent, std::uint32_t seal)
      : dims_(dims), heavy_(heavy), recent_(recent), seal_(seal), heads_(dims.n_kv_heads) {}

  void step(TestEngine& engine, std::uint32_t n_new) {
    const auto weights = engine.step({{0, n_new}}, false).weights;
    const std::size_t n_heads = dims_.n_kv_heads * dims_.group;
    for (std::uint32_t i = 0; i < n_new; ++i, ++n_) {
      for (Scores& scores : heads_) {
        scores[n_] = 0;
      }
    }
    for (std::size_t h = 0; h < n_heads; ++h) {
      for (auto& [position, score] : heads_[h / dims_.group]) {
        for (std::size_t row = 0; row < n_new; ++row) {
          score += weights[(row * n_heads + h) * dims_.n_cells + engine.cells(0)[position]];
        }
      }
    }
    const std::uint32_t held = std::max(1u, n_ * recent_ / 100);
    if (n_ - next_ < held + seal_) {
      return;
    }
    next_ = n_ - held;
    for (Scores& scores : heads_) {
      std::vector<std::pair<double, std::uint32_t>> old;
      for (const auto& [position, score] : scores) {
        if (position < next_) {
          old.push_back({score, position});
        }
      }
      std::sort(old.begin(), old.end());
      const std::size_t kept = std::min<std::size_t>(old.size(), n_ * heavy_ / 100);
      for (std::size_t i = 0; i + kept < old.size(); ++i) {
        scores.erase(old[i].second);
      }
    }
  }

  void compare(TestEngine& engine) const {
    for (std::uint32_t head = 0; head < dims_.n_kv_heads; ++head) {
      for (std::uint32_t position = 0; position < n_; ++position) {
        ASSERT_EQ(engine.holds(engine.cells(0)[position], head), heads_[head].contains(position))
            << "head " << head << ", token " << position << " of " << n_;
      }
    }
  }

 private:
  TestDims dims_;
  std::uint32_t heavy_, recent_, seal_;
  std::vector<Scores> heads_;
  std::uint32_t n_ = 0;
  std::uint32_t next_ = 0;  // the first token that was never judged
};

TEST(Eviction, KeepsWhatTheFormulaKeeps) {
  for (const auto& [heavy, recent, seal] : {std::tuple{20u, 10u, 1u}, {10, 10, 16}, {0, 20, 4}}) {
    SCOPED_TRACE(heavy);
    const TestDims dims;
    TestEngine engine(dims,
                      {{"policy", "h2o"},
                       {"heavy", std::to_string(heavy)},
                       {"recent", std::to_string(recent)},
                       {"seal", std::to_string(seal)}},
                      kernels::select_kernels("").value(), 2, 31);
    Simulation simulation(dims, heavy, recent, seal);
    for (const std::uint32_t n_new : {90u, 1u, 40u}) {
      simulation.step(engine, n_new);
      simulation.compare(engine);
    }
    for (int i = 0; i < 60 && !HasFailure(); ++i) {
      simulation.step(engine, 1);
      simulation.compare(engine);
    }
  }
}

TEST(Eviction, CountsEvictedTokensAsLiveAndFreesThem) {
  TestEngine engine({}, {{"policy", "h2o"}}, kernels::select_kernels("").value(), 1, 3);
  engine.step({{0, 400}}, false);
  const ByteCount bytes = engine.cache().bytes();
  EXPECT_EQ(bytes.live_tokens, 400u);
  // 10 % of the tokens for each head and 10 % for all.
  EXPECT_GT(bytes.ratio(), 3.0);
  EXPECT_LT(bytes.ratio(), 5.0);
  auto copy = engine.make_cache();
  copy->copy_from(engine.cache()).value();
  EXPECT_EQ(copy->bytes().live_tokens, 400u);
  copy->clear();
  EXPECT_EQ(copy->bytes().live_tokens, 0u);

  // A cell that the host writes again is a new token.
  std::uint32_t evicted = 0;
  while (engine.cache().find(evicted).found()) {
    ++evicted;
  }
  const std::vector<float> row(64, 1.0f);
  engine.cache().put(Tensor::kKey, {&evicted, 1}, {row.data(), 256, false}).value();
  EXPECT_EQ(engine.cache().bytes().live_tokens, 400u);
  EXPECT_TRUE(engine.cache().find(evicted).found());
}

}  // namespace
}  // namespace zipcache::cache
