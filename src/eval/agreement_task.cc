// Free-running agreement: the model continues a text, always with the likeliest token, and its
// words are compared with those under the FP16 cache. Weak models tell caches apart this way, and
// errors add up as in real use.
#include <algorithm>

#include "eval/data_file.h"
#include "eval/tasks.h"
#include "eval/windows.h"

namespace zipcache::eval {
namespace {

constexpr std::size_t kDefaultItems = 32;
constexpr std::size_t kAnswerTokens = 256;

class AgreementTask final : public Task {
 public:
  void add(const std::string& file, const std::vector<std::int32_t>& tokens) {
    Prompt prompt;
    prompt.id = file + ":" + std::to_string(prompts_.size());
    prompt.tokens = tokens;
    prompt.max_tokens = kAnswerTokens;
    prompts_.push_back(std::move(prompt));
  }

  Expected<std::optional<Score>> score(std::size_t /*prompt*/, const Answer& answer,
                                       const Answer& reference) const override {
    const auto& mine = answer.tokens;
    const auto& theirs = reference.tokens;
    const auto differing = std::mismatch(mine.begin(), mine.end(), theirs.begin(), theirs.end());
    const auto n_same = static_cast<double>(differing.first - mine.begin());
    const bool is_same = mine == theirs;
    const std::size_t longest = std::max<std::size_t>(1, std::max(mine.size(), theirs.size()));
    return std::optional(Score{
        is_same ? 1.0 : 0.0,
        {{"first_difference", n_same}, {"same_prefix", is_same ? 1.0 : n_same / double(longest)}}});
  }
};

}  // namespace

Expected<std::unique_ptr<Task>> make_agreement_task(const TaskOptions& options,
                                                    const Tokenizer& tokenizer) {
  if (options.n_prompt < 4) {
    return invalid_argument("a prompt to continue takes 4 tokens at least");
  }
  const std::size_t max_items = options.max_items == 0 ? kDefaultItems : options.max_items;
  auto task = std::make_unique<AgreementTask>();
  for (const std::string& name :
       options.files.empty() ? default_files("agreement", false) : options.files) {
    const Expected<std::string> path = find_data(options.data_folder, name);
    if (!path) {
      return path.error();
    }
    Expected<std::string> text = read_data(*path);
    if (!text) {
      return text.error();
    }
    // Prompts stand apart in the text: the whole of it is divided evenly.
    const std::vector<std::int32_t> tokens = tokenizer.tokenize(*text);
    const std::size_t stride = std::max(options.n_prompt, tokens.size() / max_items);
    Expected<std::vector<Window>> windows =
        cut_windows(tokens, std::min(stride, tokens.size()), max_items, tokenizer.bos);
    if (tokens.size() < options.n_prompt) {
      return invalid_argument(*path + " has fewer than " + std::to_string(options.n_prompt) +
                              " tokens");
    }
    if (!windows) {
      return windows.error();
    }
    for (Window& window : *windows) {
      window.tokens.resize(options.n_prompt);
      task->add(data_name(*path), window.tokens);
    }
  }
  return std::unique_ptr<Task>(std::move(task));
}

}  // namespace zipcache::eval
