// The cache against a plain float oracle under random use: append, overwrite, remove, copy, rotate,
// restore, seal and attend, with several sequences in one stream.
#include "cache/layer_cache.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cache/test_engine.h"
#include "ref/quant_ref.h"

namespace zipcache::cache {
namespace {

using Settings = std::map<std::string, std::string>;

struct Case {
  const char* name;
  Settings settings;
  double tolerance;  // of attention, relative to the largest |v| (sealed rows are read as fp16)
};

// Googletest's name for it.
void PrintTo(const Case& c, std::ostream* out) {  // NOLINT(readability-identifier-naming)
  *out << c.name;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> kAll = {
      {"fp16", {{"policy", "fp16"}}, 1e-4},
      {"default", {}, 3e-3},
      {"default_small", {{"seal", "32"}, {"block", "64"}, {"hold", "4"}, {"sinks", "1"}}, 3e-3},
      {"wide_channels_alone", {{"key-bits", "2"}, {"key-wide", "50"}, {"seal", "32"}}, 3e-3},
      {"budget", {{"kv-bits", "3.2"}, {"seal", "32"}}, 3e-3},
      {"half_params", {{"value-params", "half"}, {"key-bits", "8,2"}, {"value-bits", "4"}}, 3e-3},
      {"uniform_cst", {{"policy", "uniform"}, {"granularity", "channelwise+cst"}}, 3e-3},
      {"uniform_tokenwise", {{"policy", "uniform"}, {"granularity", "tokenwise"}}, 3e-3},
      {"uniform_groupwise",
       {{"policy", "uniform"}, {"granularity", "groupwise"}, {"group", "16"}},
       3e-3},
      {"uniform_plain",
       {{"policy", "uniform"}, {"granularity", "channelwise+tokenwise"}, {"key-bits", "3"}},
       3e-3},
      {"paper", {{"mode", "paper"}}, 3e-3},
      {"official", {{"mode", "official"}}, 3e-3},
      {"kivi", {{"policy", "kivi"}, {"residual", "32"}}, 4e-3},
      {"kivi_no_residual", {{"policy", "kivi"}, {"residual", "0"}, {"key-bits", "4"}}, 4e-3},
      {"mikv", {{"policy", "mikv"}, {"seal", "32"}}, 4e-3},
      {"mikv_exact", {{"policy", "mikv"}, {"seal", "32"}, {"key-bits", "16,2"}}, 4e-3},
      {"h2o", {{"policy", "h2o"}, {"heavy", "30"}, {"recent", "20"}, {"seal", "8"}}, 4e-3},
      {"gear", {{"policy", "gear"}, {"outliers", "8"}}, 4e-3},
      {"gear_l_2bit",
       {{"policy", "gear-l"}, {"key-bits", "2"}, {"value-bits", "2"}, {"group", "32"}},
       4e-3},
      {"static", {{"policy", "static"}}, 4e-3},
      {"skvq", {{"policy", "skvq"}, {"hold", "8"}, {"seal", "32"}}, 4e-3},
      {"roco", {{"metric", "roco"}, {"seal", "32"}}, 3e-3},
      {"last_token", {{"metric", "last-token"}, {"seal", "32"}}, 3e-3},
  };
  return kAll;
}

const kernels::KernelTable* kernels_or_null(const char* isa) {
  const auto table = kernels::select_kernels(isa);
  return table ? *table : nullptr;
}

// Of what TestEngine::held() returns with the default dimensions.
std::vector<float> row_of(const std::vector<float>& held, std::uint32_t cell) {
  const auto begin = held.begin() + static_cast<std::ptrdiff_t>(cell) * 64;
  return {begin, begin + 64};
}

void expect_close(const TestEngine::Outcome& outcome, double tolerance, const char* where) {
  double worst = 0;
  for (std::size_t i = 0; i < outcome.out.size(); ++i) {
    ASSERT_FALSE(std::isnan(outcome.out[i])) << where << " at " << i;
    worst = std::max(worst, std::abs(outcome.out[i] - outcome.expected[i]));
  }
  EXPECT_LE(worst, tolerance * std::max(outcome.largest_value, 1.0)) << where;
}

class CacheFuzz : public testing::TestWithParam<std::tuple<Case, const char*>> {};

TEST_P(CacheFuzz, AttendsLikeTheOracleOverWhatItHolds) {
  const auto& [c, isa] = GetParam();
  const kernels::KernelTable* kernels = kernels_or_null(isa);
  if (kernels == nullptr) {
    GTEST_SKIP() << isa << " does not run here";
  }
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(seed);
    TestDims dims;
    dims.group = 1 + static_cast<std::uint32_t>(seed);
    TestEngine engine(dims, c.settings, kernels, 1 + seed % 3, seed);
    auto& random = engine.random();
    for (int round = 0; round < 40; ++round) {
      switch (random() % 8) {
        case 0:
          engine.remove(static_cast<int>(random() % 4), random() % 40);
          break;
        case 1: {
          auto copy = engine.make_cache();
          copy->copy_from(engine.cache()).value();
          engine.replace_cache(std::move(copy));
          break;
        }
        case 2:  // half of the cells turn their keys by a quarter
          engine.cache().rotate_keys([&](std::span<const std::uint32_t> cells, float* keys) {
            bool any = false;
            const std::uint32_t width = dims.n_kv_heads * dims.key_dim;
            for (std::size_t i = 0; i < cells.size(); ++i) {
              for (std::uint32_t ch = 0; cells[i] % 2 == 1 && ch + 1 < width; ch += 2) {
                std::swap(keys[i * width + ch], keys[i * width + ch + 1]);
                keys[i * width + ch] *= -1;
                any = true;
              }
            }
            return any;
          });
          break;
        default: {
          std::vector<TestEngine::Step> steps;
          const std::uint32_t most = round % 5 == 0 ? 90 : 3;
          for (int s = 0; s < 4; ++s) {
            if (random() % 2 == 0 && engine.free_cells() > 4 * most) {
              steps.push_back({s, 1 + static_cast<std::uint32_t>(random() % most)});
            }
          }
          if (!steps.empty()) {
            expect_close(engine.step(steps, random() % 2 == 0), c.tolerance, c.name);
          }
        }
      }
      if (testing::Test::HasFailure()) {
        return;
      }
    }
    EXPECT_LE(engine.budget().used(), engine.cache().bytes().total());
    engine.cache().clear();
    EXPECT_EQ(engine.budget().used(), 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, CacheFuzz,
                         testing::Combine(testing::ValuesIn(cases()),
                                          testing::Values("scalar", "avx2", "avx512")),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  std::get<1>(info.param);
                         });

const kernels::KernelTable* best() { return kernels::select_kernels("").value(); }

TEST(LayerCache, StagedRowsAreExactAndSealedOnesClose) {
  TestEngine engine({}, {{"staging-bits", "16"}, {"hold-share", "100"}, {"sinks", "4"}}, best(), 1,
                    7);
  engine.step({{0, 300}}, false);
  const ByteCount bytes = engine.cache().bytes();
  EXPECT_EQ(bytes.live_tokens, 300u);
  EXPECT_GT(bytes.sealed_tokens, 200u);
  const std::vector<float> values = engine.held(Tensor::kValue);
  double error = 0, power = 0;
  for (std::uint32_t p = 0; p < 300; ++p) {
    const std::vector<float> row = engine.row(0, p, 1, 64);
    for (std::uint32_t c = 0; c < 64; ++c) {
      const float held = values[engine.cells(0)[p] * 64 + c];
      if (p < 4 || p >= 300 - 28) {
        EXPECT_EQ(held, round_to_half(row[c])) << "staged token " << p;
      }
      error += (held - row[c]) * (held - row[c]);
      power += row[c] * row[c];
    }
  }
  EXPECT_LT(error / power, 0.1);  // 2- and 3-bit codes of Gaussian values
}

// What the engine's row becomes in 8 bits.
std::vector<double> packed_row(const std::vector<float>& row, std::uint32_t head_dim) {
  std::vector<double> x;
  for (const float value : row) {
    x.push_back(round_to_half(value));
  }
  return ref::byte_rows(x, x.size() / head_dim, head_dim).values;
}

TEST(LayerCache, WhatAStepLeavesStagedIsPackedUntilItIsDue) {
  const std::uint32_t hold = 20, sinks = 4, n = 300;
  TestEngine engine({}, {{"hold", "20"}, {"hold-share", "100"}, {"sinks", "4"}, {"append", "64"}},
                    best(), 1, 7);
  const auto is_packed = [&](Tensor tensor, std::uint32_t position) {
    const std::vector<float> held = engine.held(tensor);
    const auto expected =
        packed_row(engine.row(0, position, tensor == Tensor::kKey ? 0 : 1, 64), TestDims{}.key_dim);
    const std::vector<float> row = row_of(held, engine.cells(0)[position]);
    for (std::uint32_t c = 0; c < 64; ++c) {
      // A code may differ where the quotient is a tie; held() rounds to fp16.
      if (std::abs(row[c] - expected[c]) > 2e-3 * (1 + std::abs(expected[c]))) {
        return false;
      }
    }
    return true;
  };
  engine.step({{0, n}}, false);
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    for (std::uint32_t p = 0; p < n; ++p) {
      ASSERT_EQ(is_packed(tensor, p), p < sinks || p >= n - hold) << p;
    }
  }
  EXPECT_EQ(engine.cache().bytes().live_tokens - engine.cache().bytes().sealed_tokens,
            hold + sinks);
  for (int i = 0; i < 63; ++i) {  // each step packs its token
    engine.step({{0, 1}}, true);
    ASSERT_TRUE(is_packed(Tensor::kValue, n + static_cast<std::uint32_t>(i)));
  }
  EXPECT_TRUE(is_packed(Tensor::kKey, n - hold));
  expect_close(engine.step({{0, 1}}, true), 3e-3, "packed tokens");  // 64 are due
  EXPECT_FALSE(is_packed(Tensor::kKey, n - hold));
  EXPECT_FALSE(is_packed(Tensor::kKey, n + 63 - hold));
  EXPECT_TRUE(is_packed(Tensor::kKey, n + 64 - hold));
  EXPECT_TRUE(is_packed(Tensor::kKey, sinks - 1));
  // A rollback into what is packed: the cells are written anew.
  engine.remove(0, 10);
  expect_close(engine.step({{0, 3}}, false), 3e-3, "overwritten");
  EXPECT_TRUE(is_packed(Tensor::kKey, n + 64 - 10));
  EXPECT_LE(engine.budget().used(), engine.cache().bytes().total());
}

TEST(LayerCache, TheEndOfAPromptIsSealedButNotAShortPrompt) {
  TestEngine engine({}, {}, best(), 1, 7);
  engine.step({{0, 65}}, false);  // 2 sinks, and 63 are fewer than a block of decoded tokens
  EXPECT_EQ(engine.cache().bytes().sealed_tokens, 0u);
  engine.step({{1, 66}}, false);
  EXPECT_EQ(engine.cache().bytes().sealed_tokens, 64u);
  engine.step({{1, 16}}, false);
  EXPECT_EQ(engine.cache().bytes().sealed_tokens, 80u);
  engine.step({{1, 15}}, false);
  EXPECT_EQ(engine.cache().bytes().sealed_tokens, 80u);
  expect_close(engine.step({{0, 1}, {1, 1}}, false), 3e-3, "sealed and packed");
}

TEST(LayerCache, AValueAloneMakesAPackedTokenExactAgain) {
  TestEngine engine({}, {}, best(), 1, 7);
  engine.step({{0, 100}}, false);
  const std::uint32_t cell = engine.cells(0)[99];
  const std::vector<float> keys = row_of(engine.held(Tensor::kKey), cell);
  const std::vector<float> value = engine.row(5, 0, 1, 64);
  engine.cache().put(Tensor::kValue, {&cell, 1}, {value.data(), 64 * sizeof(float), false}).value();
  EXPECT_EQ(row_of(engine.held(Tensor::kKey), cell), keys);
  const std::vector<float> held = row_of(engine.held(Tensor::kValue), cell);
  for (std::uint32_t c = 0; c < 64; ++c) {
    ASSERT_EQ(held[c], round_to_half(value[c]));
  }
  expect_close(engine.step({{0, 1}}, false), 3e-3, "exact among packed");
}

TEST(LayerCache, SameBytesWithAnyNumberOfThreads) {
  std::vector<std::vector<float>> outputs, keys;
  for (const std::uint32_t n_threads : {1u, 2u, 5u}) {
    TestEngine engine({}, {}, best(), n_threads, 11);
    engine.step({{0, 200}, {1, 90}}, false);
    for (int i = 0; i < 30; ++i) {
      outputs.push_back(engine.step({{0, 1}, {1, 1}}, false).out);
    }
    outputs.push_back(engine.step({{0, 80}}, false).out);
    keys.push_back(engine.held(Tensor::kKey));
  }
  const std::size_t n = outputs.size() / 3;
  for (std::size_t i = 0; i < n; ++i) {
    EXPECT_EQ(outputs[i], outputs[i + n]);
    EXPECT_EQ(outputs[i], outputs[i + 2 * n]);
  }
  EXPECT_EQ(keys[0], keys[1]);
  EXPECT_EQ(keys[0], keys[2]);
}

TEST(LayerCache, SequencesDoNotInfluenceEachOther) {
  TestEngine alone({}, {}, best(), 1, 1);
  TestEngine together({}, {}, best(), 1, 1);
  for (const std::uint32_t n : {150u, 70u, 1u, 1u, 90u}) {
    alone.step({{1, n}}, false);
    together.step({{0, n / 2 + 1}, {1, n}}, false);
  }
  ASSERT_GT(alone.cache().bytes().sealed_tokens, 200u);
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const auto a = alone.held(tensor);
    const auto b = together.held(tensor);
    for (std::size_t p = 0; p < alone.cells(1).size(); ++p) {
      ASSERT_EQ(row_of(a, alone.cells(1)[p]), row_of(b, together.cells(1)[p])) << "token " << p;
    }
  }
}

TEST(LayerCache, SameTokensAreSalientOnEveryInstructionSet) {
  std::vector<std::vector<float>> keys;
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    if (const kernels::KernelTable* kernels = kernels_or_null(isa)) {
      TestEngine engine({}, {}, kernels, 1, 11);
      engine.step({{0, 200}, {1, 90}}, false);
      for (int i = 0; i < 70; ++i) {
        engine.step({{0, 1}, {1, 1}}, false);
      }
      keys.push_back(engine.held(Tensor::kKey));
      EXPECT_EQ(keys.back(), keys.front()) << isa;
    }
  }
}

TEST(LayerCache, NanAndInfinityStayInTheirSequence) {
  for (const float poison : {NAN, INFINITY, -INFINITY}) {
    for (const char* policy : {"fp16", "zipcache"}) {
      TestEngine alone({}, {{"policy", policy}}, best(), 1, 1);
      TestEngine together({}, {{"policy", policy}}, best(), 1, 1);
      together.poison(0, poison);
      for (const std::uint32_t n : {40u, 70u, 1u, 90u, 1u}) {
        const auto a = alone.step({{1, n}}, true);
        const auto b = together.step({{1, n}, {0, n / 2 + 1}}, true);
        for (std::size_t i = 0; i < a.out.size(); ++i) {
          ASSERT_NEAR(a.out[i], b.out[i], 1e-4 * a.largest_value) << policy << " " << poison;
        }
      }
    }
  }
}

TEST(LayerCache, KiviQuantizesKeysByTheResidualAndValuesBehindIt) {
  TestEngine engine({}, {{"policy", "kivi"}, {"residual", "64"}}, best(), 1, 7);
  engine.step({{0, 150}}, false);  // keys: 128 sealed; values: all but the newest 64, in 32s
  const auto is_exact = [&](Tensor tensor, std::uint32_t position) {
    const std::vector<float> held = engine.held(tensor);
    const std::vector<float> row = engine.row(0, position, tensor == Tensor::kKey ? 0 : 1, 64);
    for (std::uint32_t c = 0; c < 64; ++c) {
      if (held[engine.cells(0)[position] * 64 + c] != round_to_half(row[c])) {
        return false;
      }
    }
    return true;
  };
  EXPECT_FALSE(is_exact(Tensor::kKey, 127));
  EXPECT_TRUE(is_exact(Tensor::kKey, 128));
  EXPECT_FALSE(is_exact(Tensor::kValue, 63));
  EXPECT_TRUE(is_exact(Tensor::kValue, 64));
  EXPECT_TRUE(is_exact(Tensor::kValue, 100));
  for (int i = 0; i < 10; ++i) {  // the block 64..95 leaves when 64 newer tokens are there
    EXPECT_TRUE(is_exact(Tensor::kValue, 64)) << i;
    engine.step({{0, 1}}, false);
  }
  EXPECT_FALSE(is_exact(Tensor::kValue, 64));
  EXPECT_TRUE(is_exact(Tensor::kValue, 96));
  EXPECT_LE(engine.budget().used(), engine.cache().bytes().total());
  engine.cache().clear();
  EXPECT_EQ(engine.budget().used(), 0u);
}

// The only block of a cache, which has two heads of 32 channels.
const SealedBlock& only_block(LayerCache& cache) {
  const SealedBlock* found = nullptr;
  for (const Segment& segment : cache.segments()) {
    if (segment.block != nullptr) {
      EXPECT_EQ(found, nullptr);
      found = segment.block.get();
    }
  }
  ZC_CHECK(found != nullptr);
  return *found;
}

TEST(LayerCache, BlocksHaveTheFactorsOfTheCalibration) {
  TestEngine engine({}, {{"policy", "static"}}, best(), 1, 7);
  engine.step({{0, 50}}, false);
  const SealedBlock& block = only_block(engine.cache());
  const policy::LayerChannels& given = engine.policy().given.at(TestEngine::kLayer);
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const auto& factors = tensor == Tensor::kKey ? given.key_factors : given.value_factors;
    for (std::uint32_t head = 0; head < 2; ++head) {
      Half stored[32];
      std::memcpy(stored, block.bytes.data() + block.layout->channel_factor(tensor, head, 0),
                  sizeof stored);
      for (std::uint32_t c = 0; c < 32; ++c) {
        EXPECT_EQ(half_to_float(stored[c]), round_to_half(factors[head * 32 + c])) << c;
      }
    }
  }
}

TEST(LayerCache, BlocksHaveTheOrdersOfTheCalibration) {
  TestEngine engine({}, {{"policy", "skvq"}, {"hold", "0"}}, best(), 1, 7);
  engine.step({{0, 150}}, false);
  const SealedBlock& block = only_block(engine.cache());
  const policy::LayerChannels& given = engine.policy().given.at(TestEngine::kLayer);
  EXPECT_NE(given.key_order, given.value_order);
  for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
    const auto& order = tensor == Tensor::kKey ? given.key_order : given.value_order;
    for (std::uint32_t head = 0; head < 2; ++head) {
      std::vector<std::uint16_t> stored(32);
      format::channel_order(*block.layout, block.bytes.data(), tensor, head, stored.data());
      EXPECT_TRUE(std::equal(stored.begin(), stored.end(), order.begin() + head * 32));
    }
  }
}

TEST(LayerCache, ACalibrationOfOtherLayersIsRefused) {
  const policy::Calibration flat = policy::flat_calibration(2, 32, 32);
  for (const char* name : {"static", "skvq"}) {
    const auto policy =
        std::make_shared<policy::Policy>(policy::make_policy({{"policy", name}}, &flat).value());
    LayerCache same({0, 64, 64, 64}, policy, std::make_shared<Budget>());
    EXPECT_TRUE(same.set_heads(2, 32, 32));
    LayerCache other({1, 64, 64, 64}, policy, std::make_shared<Budget>());
    EXPECT_EQ(other.set_heads(2, 32, 32).error().code, ErrorCode::kUnsupported);
    LayerCache split({0, 64, 64, 64}, policy, std::make_shared<Budget>());
    EXPECT_EQ(split.set_heads(4, 16, 16).error().code, ErrorCode::kUnsupported);
  }
}

TEST(LayerCache, RollbackOfOneTokenEachStepKeepsStagingSmall) {
  TestEngine engine({}, {}, best(), 1, 5);
  engine.step({{0, 100}}, false);
  for (int i = 0; i < 200; ++i) {  // as speculative decoding: two tokens in, one taken back
    engine.step({{0, 2}}, false);
    engine.remove(0, 1);
  }
  const ByteCount bytes = engine.cache().bytes();
  EXPECT_LT(bytes.live_tokens - bytes.sealed_tokens, 4u + 28u + 64u + 8u);
}

TEST(LayerCache, OverwrittenSealedTokensAreNeverSeenAgain) {
  TestEngine engine({}, {}, best(), 1, 5);
  engine.step({{0, 200}}, false);
  engine.remove(0, 150);
  for (int i = 0; i < 10; ++i) {
    expect_close(engine.step({{1, 20}}, false), 4e-3, "reused cells");
  }
  EXPECT_GT(engine.cache().bytes().slack, 0u);
}

TEST(LayerCache, SparseBlocksShrinkAndTheirTokensStay) {
  TestEngine engine({}, {}, best(), 1, 5);
  engine.step({{0, 400}}, false);
  const ByteCount before = engine.cache().bytes();
  const std::vector<float> old_keys = engine.held(Tensor::kKey);
  const std::vector<float> old_values = engine.held(Tensor::kValue);
  engine.remove(0, 300);
  engine.step({{1, 14}}, false);  // one block, but most of it is alive
  EXPECT_EQ(engine.cache().bytes().codes + engine.cache().bytes().slack, before.codes);
  engine.step({{1, 286}}, false);
  const ByteCount after = engine.cache().bytes();
  ASSERT_GT(before.sealed_tokens, 300u);
  // As many live tokens, a block more: its parameters, which at head_dim 32 are a tenth of it all,
  // and the fillers of the block that shrank.
  EXPECT_LT(after.total(), before.total() * 5 / 4);
  EXPECT_LE(engine.budget().used(), after.total());
  const std::vector<float> keys = engine.held(Tensor::kKey);
  const std::vector<float> values = engine.held(Tensor::kValue);
  for (std::uint32_t p = 0; p < 100; ++p) {
    const std::uint32_t cell = engine.cells(0)[p];
    ASSERT_EQ(row_of(keys, cell), row_of(old_keys, cell)) << "token " << p;
    ASSERT_EQ(row_of(values, cell), row_of(old_values, cell)) << "token " << p;
  }
  expect_close(engine.step({{0, 1}, {1, 1}}, false), 3e-3, "after compaction");
  engine.remove(0, 60);
  engine.step({{1, 60}}, false);  // a compacted block loses tokens, too
  expect_close(engine.step({{0, 1}, {1, 1}}, false), 3e-3, "compacted twice");
}

TEST(LayerCache, RestoredRowsAttendExactlyAndAreSealedLater) {
  TestEngine engine({}, {}, best(), 1, 5);
  engine.step({{0, 200}}, false);
  std::vector<Half> keys(200 * 64), values(200 * 64);
  engine.cache().get(Tensor::kKey, 0, 200, keys.data());
  engine.cache().get(Tensor::kValue, 0, 200, values.data());
  engine.cache().clear();
  std::vector<std::uint32_t> cells(200);
  for (std::uint32_t i = 0; i < 200; ++i) {
    cells[i] = i;
  }
  engine.cache().put(Tensor::kKey, cells, {keys.data(), 64 * sizeof(Half), true}).value();
  engine.cache().put(Tensor::kValue, cells, {values.data(), 64 * sizeof(Half), true}).value();
  EXPECT_EQ(engine.cache().bytes().sealed_tokens, 0u);
  expect_close(engine.step({{0, 1}}, false), 1e-4, "restored");
  EXPECT_GT(engine.cache().bytes().sealed_tokens, 100u);
  expect_close(engine.step({{0, 1}}, false), 3e-3, "sealed again");
}

TEST(LayerCache, ABudgetIsAnErrorAndLosesNothing) {
  const auto policy =
      std::make_shared<policy::Policy>(policy::make_policy({{"policy", "fp16"}}).value());
  const auto budget = std::make_shared<Budget>(40000);
  LayerCache cache({0, 1024, 64, 64}, policy, budget);
  std::vector<float> rows(1000 * 64, 1.0f);
  std::vector<std::uint32_t> cells(1000);
  for (std::uint32_t i = 0; i < 1000; ++i) {
    cells[i] = i;
  }
  const Status status = cache.put(Tensor::kKey, cells, {rows.data(), 64 * sizeof(float), false});
  ASSERT_FALSE(status);
  EXPECT_EQ(status.error().code, ErrorCode::kOutOfMemory);
  EXPECT_NE(status.error().message.find("40000"), std::string::npos);
  EXPECT_GT(cache.bytes().live_tokens, 0u);
  EXPECT_LE(budget->used(), 40000u);
}

TEST(LayerCache, PagesFilledBeforeTheHeadsAreKnownAreAccountedWhole) {
  const auto policy = std::make_shared<policy::Policy>(policy::make_policy({}).value());
  const auto budget = std::make_shared<Budget>();
  LayerCache cache({0, 64, 64, 64}, policy, budget);
  const std::vector<float> row(64, 1.0f);
  const std::uint32_t cell = 3;
  cache.put(Tensor::kKey, {&cell, 1}, {row.data(), 64 * sizeof(float), false}).value();
  cache.set_heads(2, 32, 32).value();
  EXPECT_EQ(budget->used(), cache.bytes().staging + cache.bytes().slack);
  cache.clear();
  EXPECT_EQ(budget->used(), 0u);
}

TEST(LayerCache, RefusesImpossibleHeads) {
  const auto policy = std::make_shared<policy::Policy>(policy::make_policy({}).value());
  LayerCache cache({0, 64, 96, 96}, policy, std::make_shared<Budget>());
  EXPECT_EQ(cache.set_heads(4, 24, 24).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(cache.set_heads(2, 32, 32).error().code, ErrorCode::kUnsupported);
  EXPECT_TRUE(cache.set_heads(3, 32, 32));
  EXPECT_EQ(cache.set_heads(6, 16, 16).error().code, ErrorCode::kUnsupported);
}

TEST(LayerCache, RefusesABudgetThatNoBlockMeets) {
  const auto cache_of = [](const char* bits) {
    const auto policy =
        std::make_shared<policy::Policy>(policy::make_policy({{"kv-bits", bits}}).value());
    return std::make_unique<LayerCache>(LayerCache::Shape{0, 64, 96, 96}, policy,
                                        std::make_shared<Budget>());
  };
  const Status refused = cache_of("2.2")->set_heads(3, 32, 32);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(refused.error().message.find("kv-bits is below the 2."), 0u);
  EXPECT_TRUE(cache_of("2.7")->set_heads(3, 32, 32));
}

}  // namespace
}  // namespace zipcache::cache
