// HumanEval: functions to complete, judged by their unit tests. The tests run what a model wrote,
// so they do only with leave (--execute), in a sandbox; without it the completions are kept
// unjudged.
#include <array>

#include "eval/sandbox.h"
#include "eval/tasks.h"

namespace zipcache::eval {
namespace {

constexpr std::size_t kAnswerTokens = 512;

class HumanEvalTask final : public Task {
 public:
  explicit HumanEvalTask(bool may_execute) : may_execute_(may_execute) {}

  void add(const DataItem& item) {
    Prompt prompt;
    prompt.id = item.text("task_id");
    prompt.text = item.text("prompt");
    prompt.max_tokens = kAnswerTokens;
    prompt.stops = {"\nclass", "\ndef", "\n#", "\nif", "\nprint"};
    prompts_.push_back(std::move(prompt));
    checks_.push_back(item.text("test") + "\n\ncheck(" + item.text("entry_point") + ")\n");
  }

  Expected<std::optional<Score>> score(std::size_t prompt, const Answer& answer,
                                       const Answer& /*reference*/) const override {
    if (!may_execute_) {
      return std::optional<Score>();
    }
    const Expected<SandboxResult> result =
        run_python(prompts_[prompt].text + answer.text + "\n" + checks_[prompt], {});
    if (!result) {
      return result.error();
    }
    return std::optional(
        Score{result->succeeded ? 1.0 : 0.0, {{"had_network", result->has_network ? 1.0 : 0.0}}});
  }

 private:
  bool may_execute_;
  std::vector<std::string> checks_;
};

}  // namespace

Expected<std::unique_ptr<Task>> make_humaneval_task(const TaskOptions& options) {
  constexpr std::array kKeys = {"task_id", "prompt", "test", "entry_point"};
  Expected<std::vector<DataItem>> items = read_items(
      options.files.empty() ? default_files("humaneval", false) : options.files, options, kKeys);
  if (!items) {
    return items.error();
  }
  auto task = std::make_unique<HumanEvalTask>(options.may_execute);
  for (const DataItem& item : *items) {
    task->add(item);
  }
  return std::unique_ptr<Task>(std::move(task));
}

}  // namespace zipcache::eval
