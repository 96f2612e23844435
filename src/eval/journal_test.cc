// Kept samples: what is written is what is read, and another run is told apart.
#include "eval/journal.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "eval/results.h"

namespace zipcache::eval {
namespace {

namespace fs = std::filesystem;

class JournalTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = (fs::temp_directory_path() / ("zipcache-journal-" + std::to_string(getpid())));
  }
  void TearDown() override { fs::remove_all(folder_); }

  Expected<Journal> open(const nlohmann::ordered_json& identity = {{"n_ctx", 512}}) const {
    return Journal::open(folder_.string(), identity, {{"command", "test"}});
  }

  fs::path folder_;
};

Sample prompt_sample(const std::string& policy, const std::string& item, const std::string& text) {
  Sample sample;
  sample.policy = policy;
  sample.item = item;
  sample.n_tokens = 10;
  sample.cpu_seconds = 0.5;
  sample.bytes = {.codes = 100, .staging = 28, .fp16 = 512};
  sample.answer = {text, {1, 2, 3}};
  return sample;
}

TEST_F(JournalTest, GoesOnWhereItStopped) {
  Sample window = prompt_sample("default", "1", "");
  window.positions = {{1.5f, 1.25f, 0.1f, -0.3f, true}, {2, 3, 1e-7f, 0, false}};
  {
    Expected<Journal> journal = open();
    ASSERT_TRUE(journal) << journal.error().message;
    ASSERT_TRUE(journal->add(prompt_sample("fp16", "0", "a \xff b")));
    ASSERT_TRUE(journal->add(window));
  }
  std::ofstream(folder_ / "samples.jsonl", std::ios::app) << "{\"policy\": \"cut o";
  {
    Expected<Journal> journal = open();
    ASSERT_TRUE(journal) << journal.error().message;
    ASSERT_EQ(journal->samples().size(), 2u);
    EXPECT_EQ(journal->find("fp16", "1"), nullptr);
    const Sample* answer = journal->find("fp16", "0");
    ASSERT_NE(answer, nullptr);
    EXPECT_EQ(answer->answer.tokens, (std::vector<std::int32_t>{1, 2, 3}));
    EXPECT_EQ(answer->bytes.total(), 128u);
    const Sample* kept = journal->find("default", "1");
    ASSERT_NE(kept, nullptr);
    ASSERT_EQ(kept->positions.size(), 2u);
    EXPECT_EQ(kept->positions[0].kld, 0.1f);
    EXPECT_EQ(kept->positions[1].kld, 1e-7f);
    EXPECT_TRUE(kept->positions[0].same_top);
    ASSERT_TRUE(journal->add(prompt_sample("fp16", "2", "more")));
  }
  EXPECT_EQ(open()->samples().size(), 3u);
}

TEST_F(JournalTest, NamesWhatDiffers) {
  ASSERT_TRUE(open({{"n_ctx", 512}, {"model", "a"}}));
  const auto other = open({{"n_ctx", 1024}, {"model", "a"}});
  ASSERT_FALSE(other);
  EXPECT_NE(other.error().message.find("n_ctx was 512 and is now 1024"), std::string::npos);
  EXPECT_FALSE(open({{"n_ctx", 512}, {"model", "a"}, {"new", 1}}));
  EXPECT_FALSE(open({{"n_ctx", 512}}));
  EXPECT_TRUE(open({{"n_ctx", 512}, {"model", "a"}}));
}

TEST_F(JournalTest, DamageIsAnError) {
  ASSERT_TRUE(open());
  std::ofstream(folder_ / "samples.jsonl") << "{\"policy\": 1}\n";
  EXPECT_NE(open().error().message.find("line 1"), std::string::npos);
  std::ofstream(folder_ / "run_meta.json") << "nothing";
  EXPECT_NE(open().error().message.find("run_meta.json"), std::string::npos);
}

// A task of three questions whose right answer is "yes".
class YesTask final : public Task {
 public:
  YesTask() {
    for (const char* id : {"0", "1", "2"}) {
      prompts_.emplace_back().id = id;
    }
  }
  Expected<std::optional<Score>> score(std::size_t /*prompt*/, const Answer& answer,
                                       const Answer& reference) const override {
    return std::optional(Score{answer.text == "yes" ? 1.0 : 0.0,
                               {{"as_reference", answer.text == reference.text ? 1.0 : 0.0}}});
  }
};

TEST(Results, OfPrompts) {
  Journal journal = Journal::open("", {}, {}).value();
  for (const char* item : {"0", "1", "2"}) {
    ASSERT_TRUE(journal.add(prompt_sample("fp16", item, "yes")));
    ASSERT_TRUE(journal.add(prompt_sample("default", item, *item == '0' ? "yes" : "no")));
  }
  const auto records = prompt_records(journal, YesTask(), {"fp16", "default"}, {{"task", "yes"}});
  ASSERT_TRUE(records);
  const Record& compressed = (*records)[1];
  EXPECT_EQ(compressed["task"], "yes");
  EXPECT_NEAR(compressed["score"].get<double>(), 1.0 / 3, 1e-12);
  EXPECT_EQ(compressed["score_fp16"], 1.0);
  EXPECT_NEAR(compressed["as_reference"].get<double>(), 1.0 / 3, 1e-12);
  EXPECT_EQ(compressed["bits_per_element"], 4.0);
  EXPECT_EQ(compressed["versus"]["fp16"]["worse"], 2);
  EXPECT_EQ(compressed["versus"]["fp16"]["mcnemar_p"], 0.5);
  const std::string table = to_markdown(*records);
  EXPECT_NE(table.find("| `default` | 4.000 | 4.00x | 0.3333"), std::string::npos) << table;
}

TEST(Results, OfWindows) {
  Journal journal = Journal::open("", {}, {}).value();
  for (const auto& [policy, kld] : {std::pair{"fp16", 0.0f}, {"a", 0.5f}, {"b", 0.25f}}) {
    Sample sample = prompt_sample(policy, "0", "");
    sample.positions.assign(200, {.nll = 1, .nll_base = 1, .kld = kld, .same_top = true});
    ASSERT_TRUE(journal.add(sample));
  }
  const auto records = window_records(journal, {"fp16", "a", "b"}, {"0"}, {});
  EXPECT_DOUBLE_EQ(records[1]["kld_mean"], 0.5);
  EXPECT_EQ(records[1]["n_tokens"], 200);
  EXPECT_TRUE(records[1]["versus"].empty());
  EXPECT_DOUBLE_EQ(records[2]["versus"]["a"]["kld_difference"], -0.25);
  EXPECT_NE(to_markdown(records).find("| `b` | 4.000 | 4.00x | 0.25000 ±"), std::string::npos);
}

}  // namespace
}  // namespace zipcache::eval
