// GSM8K: grade-school problems, either after eight worked examples (chain of thought, to be
// continued) or asked in the model's chat template. Scored by the final number.
#include <array>

#include "eval/data_file.h"
#include "eval/tasks.h"
#include "eval/text_metrics.h"

namespace zipcache::eval {
namespace {

constexpr std::size_t kAnswerTokens = 256;
constexpr std::string_view kReasoning = "\nLet's think step by step\n";
constexpr std::string_view kChatReasoning =
    "\nLet's think step by step. End with \"The answer is\" and the number.";

class Gsm8kTask final : public Task {
 public:
  void add(const DataItem& item, const std::string& examples, bool is_chat, double truth) {
    Prompt prompt;
    prompt.id = item.id();
    prompt.is_chat = is_chat;
    prompt.max_tokens = kAnswerTokens;
    if (is_chat) {
      prompt.text = item.text("question").append(kChatReasoning);
    } else {
      prompt.text = examples + "\n\nQuestion: " + item.text("question").append(kReasoning);
      prompt.stops = {"\nQuestion:", "\n\n"};
    }
    prompts_.push_back(std::move(prompt));
    truths_.push_back(truth);
  }

  Expected<std::optional<Score>> score(std::size_t prompt, const Answer& answer,
                                       const Answer& /*reference*/) const override {
    return std::optional(Score{final_number(answer.text) == truths_[prompt] ? 1.0 : 0.0, {}});
  }

 private:
  std::vector<double> truths_;
};

std::string trimmed(const std::string& text) {
  return text.substr(0, text.find_last_not_of(" \n") + 1);
}

}  // namespace

Expected<std::unique_ptr<Task>> make_gsm8k_task(const TaskOptions& options) {
  const std::vector<std::string> defaults = default_files("gsm8k", options.is_chat);
  std::string examples;
  if (!options.is_chat) {
    const Expected<std::string> path = find_data(options.data_folder, defaults.back());
    if (!path) {
      return path.error();
    }
    const Expected<std::string> text = read_data(*path);
    if (!text) {
      return text.error();
    }
    examples = trimmed(*text);
  }
  const std::vector<std::string> files =
      options.files.empty() ? std::vector<std::string>{defaults.front()} : options.files;
  constexpr std::array kKeys = {"question", "answer"};
  Expected<std::vector<DataItem>> items = read_items(files, options, kKeys);
  if (!items) {
    return items.error();
  }
  auto task = std::make_unique<Gsm8kTask>();
  for (const DataItem& item : *items) {
    const std::optional<double> truth = final_number(item.text("answer"));
    if (!truth) {
      return corrupt(item.id() + ": no number in its answer");
    }
    task->add(item, examples, options.is_chat, *truth);
  }
  return std::unique_ptr<Task>(std::move(task));
}

}  // namespace zipcache::eval
