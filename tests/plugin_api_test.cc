// The plug-in in a program of its own: loaded by path, configured and asked for its report through
// ggml's registry, with several contexts of one model at a time.

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

struct ContextDeleter {
  void operator()(llama_context* context) const { llama_free(context); }
};
using Context = std::unique_ptr<llama_context, ContextDeleter>;

class PluginApiTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (!std::filesystem::exists(ZIPCACHE_TEST_MODEL)) {
      return;
    }
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    registry_ = ggml_backend_load(ZIPCACHE_TEST_PLUGIN);
    ASSERT_NE(registry_, nullptr);
    configure_ = reinterpret_cast<const char* (*)(const char*)>(
        ggml_backend_reg_get_proc_address(registry_, "zipcache_configure"));
    report_ = reinterpret_cast<const char* (*)()>(
        ggml_backend_reg_get_proc_address(registry_, "zipcache_report_json"));
    ASSERT_NE(configure_, nullptr);
    ASSERT_NE(report_, nullptr);

    static ggml_backend_dev_t devices[] = {ggml_backend_reg_dev_get(registry_, 0), nullptr};
    llama_model_params params = llama_model_default_params();
    params.devices = devices;
    params.n_gpu_layers = 99;
    model_ = llama_model_load_from_file(ZIPCACHE_TEST_MODEL, params);
    ASSERT_NE(model_, nullptr);
  }

  static void TearDownTestSuite() { llama_model_free(model_); }

  void SetUp() override {
    if (model_ == nullptr) {
      GTEST_SKIP() << "no model at " << ZIPCACHE_TEST_MODEL;
    }
    ASSERT_EQ(configure_("report=0"), nullptr);
  }

  static Context make_context(const std::string& settings, std::uint32_t n_streams = 1) {
    if (const char* wrong = configure_(("report=0\n" + settings).c_str())) {
      ADD_FAILURE() << wrong;
      return nullptr;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512 * n_streams;
    params.n_batch = params.n_ubatch = 128;
    params.n_seq_max = n_streams;
    params.kv_unified = false;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    return Context(llama_init_from_model(model_, params));
  }

  // Appends n tokens of a fixed text to a sequence; the logits after the last one.
  static std::vector<float> decode(llama_context* context, int n, llama_seq_id sequence = 0) {
    llama_batch batch = llama_batch_init(128, 0, 1);
    const llama_pos start = llama_memory_seq_pos_max(llama_get_memory(context), sequence) + 1;
    for (int i = 0; i < n; ++i) {
      const int slot = batch.n_tokens++;
      batch.token[slot] = 1000 + ((start + i) * 7919) % 20000;
      batch.pos[slot] = start + i;
      batch.n_seq_id[slot] = 1;
      batch.seq_id[slot][0] = sequence;
      batch.logits[slot] = i == n - 1;
      if (batch.n_tokens == 128 || i == n - 1) {
        EXPECT_EQ(llama_decode(context, batch), 0);
        batch.n_tokens = 0;
      }
    }
    llama_batch_free(batch);
    const float* logits = llama_get_logits_ith(context, -1);
    return {logits, logits + llama_vocab_n_tokens(llama_model_get_vocab(model_))};
  }

  static nlohmann::json report() { return nlohmann::json::parse(report_()); }

  static ggml_backend_reg_t registry_;
  static const char* (*configure_)(const char*);
  static const char* (*report_)();
  static llama_model* model_;
};

ggml_backend_reg_t PluginApiTest::registry_ = nullptr;
const char* (*PluginApiTest::configure_)(const char*) = nullptr;
const char* (*PluginApiTest::report_)() = nullptr;
llama_model* PluginApiTest::model_ = nullptr;

TEST_F(PluginApiTest, LoadedTwiceIsTheSame) {
  EXPECT_EQ(ggml_backend_load(ZIPCACHE_TEST_PLUGIN), registry_);
}

TEST_F(PluginApiTest, ConfigureSaysWhatIsWrong) {
  const char* wrong = configure_("key-bits=5");
  ASSERT_NE(wrong, nullptr);
  EXPECT_NE(std::string(wrong).find("key-bits"), std::string::npos);
  EXPECT_NE(configure_("keybits=4"), nullptr);
  EXPECT_NE(configure_("force-isa=scalar"), nullptr) << "too late";
  EXPECT_EQ(configure_("policy=fp16\nreport=0"), nullptr);
}

TEST_F(PluginApiTest, ReportFollowsTheContexts) {
  const Context fp16 = make_context("policy=fp16");
  ASSERT_NE(fp16, nullptr);
  decode(fp16.get(), 200);
  const auto of_fp16 = report();
  EXPECT_EQ(of_fp16["live_tokens"], 200);
  EXPECT_LE(of_fp16["ratio"], 1.0);
  EXPECT_EQ(of_fp16["bytes"]["codes"], 0);

  const Context packed = make_context("policy=zipcache");
  decode(packed.get(), 400);
  const auto of_both = report();
  EXPECT_GT(of_both["bytes"]["codes"], 0);
  EXPECT_GT(of_both["fp16_bytes"], of_fp16["fp16_bytes"]);
  llama_memory_clear(llama_get_memory(packed.get()), true);
  EXPECT_EQ(report()["fp16_bytes"], of_fp16["fp16_bytes"]);
}

TEST_F(PluginApiTest, ContextsDoNotDisturbEachOther) {
  const std::vector<float> alone = decode(make_context("policy=zipcache").get(), 300);
  Context first = make_context("policy=zipcache");
  Context second = make_context("policy=zipcache");
  std::vector<float> of_second;
  std::thread other([&] { of_second = decode(second.get(), 300); });
  const std::vector<float> of_first = decode(first.get(), 300);
  other.join();
  EXPECT_EQ(of_first, alone);
  EXPECT_EQ(of_second, alone);
  first.reset();  // the one made first goes first; the other goes on
  EXPECT_FALSE(std::isnan(decode(second.get(), 1)[0]));
}

// A sequence's state through plain memory into another context; not in the first stream.
TEST_F(PluginApiTest, StateComesBack) {
  constexpr llama_seq_id kSequence = 1;
  const Context context = make_context("policy=fp16", /*n_streams=*/3);
  decode(context.get(), 150, kSequence);
  const auto save = [](llama_context* of) {
    std::vector<std::uint8_t> state(llama_state_seq_get_size(of, kSequence));
    EXPECT_EQ(llama_state_seq_get_data(of, state.data(), state.size(), kSequence), state.size());
    return state;
  };
  const std::vector<std::uint8_t> state = save(context.get());
  const std::vector<float> expected = decode(context.get(), 1, kSequence);

  const Context restored = make_context("policy=fp16", /*n_streams=*/3);
  decode(restored.get(), 60, 2);
  ASSERT_EQ(llama_state_seq_set_data(restored.get(), state.data(), state.size(), kSequence),
            state.size());
  EXPECT_TRUE(save(restored.get()) == state);
  EXPECT_EQ(decode(restored.get(), 1, kSequence), expected);
}

TEST_F(PluginApiTest, StreamsAreCopied) {
  for (const char* policy : {"policy=fp16", "policy=zipcache"}) {
    const Context context = make_context(policy, /*n_streams=*/3);
    decode(context.get(), 300, 1);
    decode(context.get(), 40, 2);
    const auto before = report()["fp16_bytes"].get<double>();
    llama_memory_seq_rm(llama_get_memory(context.get()), 2, -1, -1);
    llama_memory_seq_cp(llama_get_memory(context.get()), 1, 2, -1, -1);
    const std::vector<float> expected = decode(context.get(), 1, 1);
    EXPECT_EQ(decode(context.get(), 1, 2), expected) << policy;
    EXPECT_NEAR(report()["fp16_bytes"].get<double>(), before * 602 / 340, 1) << policy;
  }
}

TEST_F(PluginApiTest, AnAbortedDecodeCanBeRepeated) {
  const std::vector<float> expected = decode(make_context("policy=zipcache").get(), 200);
  const Context context = make_context("policy=zipcache");
  std::vector<llama_token> tokens(128, 1000);
  int asked = 0;
  llama_set_abort_callback(
      context.get(), [](void* counter) { return ++*static_cast<int*>(counter) == 40; }, &asked);
  EXPECT_EQ(llama_decode(context.get(), llama_batch_get_one(tokens.data(), 128)), 2);
  llama_set_abort_callback(context.get(), nullptr, nullptr);
  EXPECT_GE(asked, 40);
  llama_memory_clear(llama_get_memory(context.get()), true);
  EXPECT_EQ(decode(context.get(), 200), expected);
}

TEST_F(PluginApiTest, BeyondTheLimitDecodingFailsAndRecovers) {
  const Context context = make_context("policy=fp16\nlimit-mib=4");
  std::vector<llama_token> tokens(512, 1000);
  int failed = 0;
  for (int first = 0; first < 512 && failed == 0; first += 128) {
    failed = llama_decode(context.get(), llama_batch_get_one(tokens.data() + first, 128));
  }
  EXPECT_LT(failed, 0);
  llama_memory_clear(llama_get_memory(context.get()), true);
  EXPECT_FALSE(std::isnan(decode(context.get(), 30)[0]));
}

}  // namespace
