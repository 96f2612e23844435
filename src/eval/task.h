// A task asks a model prompts and judges its answers. It knows nothing of models and caches:
// prompts go out as text, answers come back, and each is scored alone, so that answers kept from an
// earlier run can be judged at any time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/expected.h"

namespace zipcache::eval {

struct Prompt {
  std::string id;    // of the item; unique in the task, the same in every run
  std::string text;  // the user's message of a chat, or the beginning of a text to continue
  std::vector<std::int32_t> tokens;  // instead of text, where not empty
  bool is_chat = false;
  bool may_cut_middle = false;     // where it is too long for the context; else that is an error
  std::size_t max_tokens = 0;      // of the answer
  std::vector<std::string> stops;  // the answer ends before the first of these
};

struct Answer {
  std::string text;
  std::vector<std::int32_t> tokens;
};

// How good an answer is: 0 (wrong) to 1 (right), and further measures by name.
struct Score {
  double value = 0;
  std::vector<std::pair<std::string, double>> more;
};

class Task {
 public:
  virtual ~Task() = default;

  const std::vector<Prompt>& prompts() const { return prompts_; }

  // Other lengths of answers than the task's own.
  void set_max_tokens(std::size_t max_tokens) {
    for (Prompt& prompt : prompts_) {
      prompt.max_tokens = max_tokens;
    }
  }

  // `reference` is the answer that the FP16 cache gave to the same prompt. nullopt: not judged
  // without the user's leave (code is executed only on request).
  virtual Expected<std::optional<Score>> score(std::size_t prompt, const Answer& answer,
                                               const Answer& reference) const = 0;

 protected:
  std::vector<Prompt> prompts_;
};

struct TaskOptions {
  std::string name{};
  std::vector<std::string> files{};  // data; empty = default_files()
  std::string data_folder{};         // where files that are not here are looked for
  std::size_t max_items = 0;         // 0 = all
  std::size_t n_lines = 20;          // lines: of a made-up record, when there is no file
  std::uint64_t seed = 0;            // lines
  std::size_t n_prompt = 256;        // agreement: tokens of a prompt
  std::size_t n_predict = 0;         // longest answer; 0 = the task's own
  bool is_chat = false;              // lines, gsm8k: ask in the model's chat template
  bool may_execute = false;          // humaneval
};

// Ordinary text into tokens, and the token that begins a text (< 0 = none): for tasks that cut
// texts at tokens.
struct Tokenizer {
  std::function<std::vector<std::int32_t>(std::string_view)> tokenize;
  std::int32_t bos = -1;
};

// Tasks that ask prompts. "ppl" is not one of them: it scores a given text (eval/windows.h).
std::span<const std::string_view> prompt_task_names();

// An error for an unknown name, missing or malformed data.
Expected<std::unique_ptr<Task>> make_task(const TaskOptions& options, const Tokenizer& tokenizer);

// Files that the task of this name reads when options.files is empty, relative to the data folder.
std::vector<std::string> default_files(std::string_view task, bool is_chat);

}  // namespace zipcache::eval
