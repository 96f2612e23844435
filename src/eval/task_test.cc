// Prompts and scores of the tasks, on data written here.
#include "eval/task.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "eval/data_file.h"
#include "eval/policy_spec.h"
#include "eval/sandbox.h"

namespace zipcache::eval {
namespace {

namespace fs = std::filesystem;

// A data folder with what the test puts there.
class TaskTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("zipcache-task-test-" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  void write(const std::string& name, const std::string& text) {
    fs::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name) << text;
  }
  std::unique_ptr<Task> make(TaskOptions options) const {
    options.data_folder = folder_.string();
    Expected<std::unique_ptr<Task>> task = make_task(options, letters());
    EXPECT_TRUE(task) << (task ? "" : task.error().message);
    return task ? std::move(*task) : nullptr;
  }
  std::string error_of(TaskOptions options) const {
    options.data_folder = folder_.string();
    const auto task = make_task(options, letters());
    return task ? "" : task.error().message;
  }
  static double score(const Task& task, std::size_t prompt, const std::string& text) {
    const auto score = task.score(prompt, {text, {}}, {});
    EXPECT_TRUE(score && score->has_value());
    return (*score)->value;
  }

  // One token per byte.
  static Tokenizer letters() {
    return {
        [](std::string_view text) { return std::vector<std::int32_t>(text.begin(), text.end()); },
        /*bos=*/1};
  }

 private:
  fs::path folder_;
};

TEST_F(TaskTest, MadeUpLinesFollowSeedAndLength) {
  const TaskOptions options{.name = "lines", .files = {}, .max_items = 3, .n_lines = 7, .seed = 5};
  const auto task = make(options), again = make(options);
  ASSERT_EQ(task->prompts().size(), 3u);
  TaskOptions other = options;
  other.seed = 6;
  for (std::size_t item = 0; item < 3; ++item) {
    const std::string& text = task->prompts()[item].text;
    EXPECT_EQ(text, again->prompts()[item].text);
    EXPECT_NE(text, make(other)->prompts()[item].text);
    std::size_t n_lines = 0;
    for (std::size_t at = 0; (at = text.find("REGISTER_CONTENT is <", at)) != std::string::npos;
         ++at) {
      ++n_lines;
    }
    EXPECT_EQ(n_lines, 8u);  // and the cue
    // The answer stands in the record, in the line that is asked for.
    const std::string cue = text.substr(text.rfind("\nline ") + 1);
    const std::size_t number_at = text.find(cue) + cue.size();
    ASSERT_LT(number_at, text.size());
    const std::string number = text.substr(number_at, text.find('>', number_at) - number_at);
    EXPECT_EQ(score(*task, item, number), 1);
    EXPECT_EQ(score(*task, item, number + "1"), 0);
    EXPECT_EQ(score(*task, item, ""), 0);
  }
}

TEST_F(TaskTest, LinesOfLongEval) {
  write("lines.jsonl",
        R"({"random_idx": ["torpid-kid", 7], "expected_number": 2416, "prompt": "record ..."})"
        "\n");
  TaskOptions options{.name = "lines", .files = {"lines.jsonl"}};
  EXPECT_EQ(score(*make(options), 0, "2416"), 1);
  options.is_chat = true;
  const auto task = make(options);
  EXPECT_EQ(task->prompts()[0].text, "record ...");
  EXPECT_TRUE(task->prompts()[0].is_chat);
  EXPECT_EQ(score(*task, 0, "In line 7 it is <2416>"), 1);
  EXPECT_EQ(score(*task, 0, "2416, no, 7"), 0);
  for (const char* bad :
       {R"({"prompt": "record"})",
        R"({"random_idx": ["torpid-kid"], "expected_number": 4294967296, "prompt": "record"})"}) {
    write("lines.jsonl", bad);
    EXPECT_NE(error_of(options).find("expected_number"), std::string::npos);
  }
}

TEST_F(TaskTest, Gsm8k) {
  write("gsm8k/test.jsonl", R"({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"})"
                            "\n"
                            R"({"question": "a?", "answer": "#### 1,000"})"
                            "\n");
  write("prompts/gear/gsm8k_prompt_original.txt", "Question: 0?\nThe answer is 0.\n\n");
  TaskOptions options{.name = "gsm8k", .files = {}};
  const auto few_shot = make(options);
  ASSERT_EQ(few_shot->prompts().size(), 2u);
  EXPECT_EQ(few_shot->prompts()[0].text,
            "Question: 0?\nThe answer is 0.\n\nQuestion: 1 + 1?\nLet's think step by step\n");
  EXPECT_EQ(score(*few_shot, 0, "The answer is 2."), 1);
  EXPECT_EQ(score(*few_shot, 1, "The answer is $1000"), 1);
  EXPECT_EQ(score(*few_shot, 1, "The answer is 1"), 0);
  options.is_chat = true;
  options.n_predict = 5;
  const auto chat = make(options);
  EXPECT_TRUE(chat->prompts()[0].is_chat);
  EXPECT_EQ(chat->prompts()[0].max_tokens, 5u);
}

TEST_F(TaskTest, HumanEvalRunsCodeOnlyWithLeave) {
  write("h.jsonl", R"({"task_id": "T/0", "prompt": "def two():\n", "entry_point": "two",)"
                   R"( "test": "def check(f):\n    assert f() == 2\n"})");
  TaskOptions options{.name = "humaneval", .files = {"h.jsonl"}};
  const auto unjudged = make(options)->score(0, {"    return 2", {}}, {});
  ASSERT_TRUE(unjudged);
  EXPECT_FALSE(unjudged->has_value());
  options.may_execute = true;
  const auto task = make(options);
  EXPECT_EQ(score(*task, 0, "    return 2"), 1);
  EXPECT_EQ(score(*task, 0, "    return 3"), 0);
}

TEST(Sandbox, LimitsPrograms) {
  const auto succeeds = [](const std::string& program) {
    const auto result = run_python(program, {.seconds = 1});
    EXPECT_TRUE(result) << (result ? "" : result.error().message);
    return result && result->succeeded;
  };
  EXPECT_TRUE(succeeds("print(1)"));
  EXPECT_FALSE(succeeds("raise ValueError"));
  EXPECT_FALSE(succeeds("while True: pass"));
  EXPECT_FALSE(succeeds("x = bytearray(2 << 30)"));
  EXPECT_FALSE(succeeds("open('f', 'wb').write(b'0' * (2 << 20))"));
  EXPECT_FALSE(succeeds("import os; os.environ['HOME']"));
  EXPECT_FALSE(succeeds("open('/etc/zipcache-was-here', 'w')"));
  // Cut off, even the loopback can't be reached (101); else nobody listens there.
  const auto network = run_python(
      "import socket, sys\n"
      "try: socket.create_connection(('127.0.0.1', 9), 1)\n"
      "except OSError as error: sys.exit(error.errno != 101)",
      {.seconds = 2});
  ASSERT_TRUE(network);
  EXPECT_EQ(network->succeeded, !network->has_network);
}

TEST_F(TaskTest, LongBench) {
  write("longbench/config/dataset2prompt.json",
        R"({"trec": "{context}\n{input}", "hotpotqa": "Q {input} C {context}"})");
  write("longbench/config/dataset2maxlen.json", R"({"trec": 64, "hotpotqa": 32})");
  write("hotpotqa.jsonl", R"({"input": "who?", "context": "He.", "answers": ["him", "he"]})");
  write("mixed.jsonl", R"({"input": "q", "context": "c", "answers": ["City"], "dataset": "trec",)"
                       R"( "all_classes": ["City", "Animal"]})");
  const auto task = make({.name = "longbench", .files = {"hotpotqa.jsonl", "mixed.jsonl"}});
  ASSERT_EQ(task->prompts().size(), 2u);
  EXPECT_EQ(task->prompts()[0].text, "Q who? C He.");
  EXPECT_EQ(task->prompts()[0].max_tokens, 32u);
  EXPECT_TRUE(task->prompts()[0].is_chat);
  EXPECT_FALSE(task->prompts()[1].is_chat);
  EXPECT_EQ(score(*task, 0, "It was he."), 2 * (1.0 / 3) / (1.0 / 3 + 1));
  EXPECT_EQ(score(*task, 1, "\nCity\nAnimal"), 1);
  write("other.jsonl", R"({"input": "q", "context": "c", "answers": ["a"]})");
  EXPECT_NE(error_of({.name = "longbench", .files = {"other.jsonl"}}).find("'other'"),
            std::string::npos);
  EXPECT_NE(error_of({.name = "longbench", .files = {}}).find("--data"), std::string::npos);
  const TaskOptions options{.name = "longbench", .files = {"hotpotqa.jsonl"}};
  for (const char* bad : {R"([1, null])", R"(["he", 1])", R"("he")", "7", "[]"}) {
    write("hotpotqa.jsonl",
          R"({"input": "who?", "context": "He.", "answers": )" + std::string(bad) + "}");
    EXPECT_NE(error_of(options).find("no answers"), std::string::npos) << bad;
  }
  write("longbench/config/dataset2maxlen.json", R"({"hotpotqa": -1.5})");
  EXPECT_NE(error_of(options).find("no length for 'hotpotqa'"), std::string::npos);
}

TEST_F(TaskTest, AgreementComparesWithTheReference) {
  write("text.txt", std::string(100, 'a') + std::string(100, 'b'));
  const auto task =
      make({.name = "agreement", .files = {"text.txt"}, .max_items = 2, .n_prompt = 10});
  ASSERT_EQ(task->prompts().size(), 2u);
  std::vector<std::int32_t> second(10, 'b');
  second.front() = 1;  // BOS
  EXPECT_EQ(task->prompts()[1].tokens, second);
  const Answer reference{"", {1, 2, 3, 4}};
  const auto same = task->score(0, reference, reference);
  EXPECT_EQ((*same)->value, 1);
  const auto other = task->score(0, {"", {1, 2, 9, 4}}, reference);
  EXPECT_EQ((*other)->value, 0);
  EXPECT_EQ((*other)->more[0], (std::pair<std::string, double>{"first_difference", 2}));
  EXPECT_EQ((*other)->more[1], (std::pair<std::string, double>{"same_prefix", 0.5}));
  const auto shorter = task->score(0, {"", {1, 2}}, reference);
  EXPECT_EQ((*shorter)->value, 0);
  EXPECT_NE(error_of({.name = "agreement", .files = {"text.txt"}, .n_prompt = 300}).find("300"),
            std::string::npos);
}

TEST_F(TaskTest, ErrorsAreOneClearLine) {
  EXPECT_NE(error_of({.name = "riddle", .files = {}}).find("'riddle'; known: ppl, lines"),
            std::string::npos);
  EXPECT_NE(error_of({.name = "gsm8k", .files = {}, .is_chat = true}).find("ZIPCACHE_DATA"),
            std::string::npos);
  write("bad.jsonl", "{\"question\": \"a\", \"answer\": \"1\"}\nno json\n");
  EXPECT_NE(error_of({.name = "gsm8k", .files = {"bad.jsonl"}, .is_chat = true}).find("line 2"),
            std::string::npos);
  write("bad.jsonl", "{\"question\": \"a\"}\n");
  EXPECT_NE(error_of({.name = "gsm8k", .files = {"bad.jsonl"}, .is_chat = true}).find("'answer'"),
            std::string::npos);
}

TEST(PolicySpecs, ValuesMayHoldCommas) {
  const auto spec = parse_policy("key-bits=4,3,sinks=0");
  ASSERT_TRUE(spec);
  EXPECT_EQ(spec->settings,
            (std::map<std::string, std::string>{{"key-bits", "4,3"}, {"sinks", "0"}}));
  EXPECT_EQ(parse_policy("q4_0")->host_type, "q4_0");
  EXPECT_TRUE(parse_policy("default")->settings.empty());
  EXPECT_FALSE(parse_policy("q4"));
  EXPECT_FALSE(parse_policy(""));
  EXPECT_FALSE(parse_policy("a=1,a=2"));
  const std::vector<std::string> texts{"default", "fp16"};
  const auto specs = parse_policies(texts);
  ASSERT_TRUE(specs);
  EXPECT_EQ((*specs)[0].name, "fp16");
  EXPECT_EQ((*specs)[1].name, "default");
  EXPECT_FALSE(parse_policies(std::vector<std::string>{"default", "default"}));
}

}  // namespace
}  // namespace zipcache::eval
