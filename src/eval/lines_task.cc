// Line retrieval: a record of lines, each with a number, and the question for one of them.
// LongEval's files, or records made up here, as long as asked and the same for the same seed.
#include <fmt/format.h>

#include <array>
#include <set>

#include "base/philox.h"
#include "eval/tasks.h"
#include "eval/text_metrics.h"

namespace zipcache::eval {
namespace {

constexpr std::size_t kDefaultItems = 100;  // of made-up records
constexpr std::uint32_t kMaxNumber = 50000;
constexpr std::size_t kCuedTokens = 8, kChatTokens = 48;

constexpr std::array kAdjectives = {
    "amber",  "ancient", "bitter",  "blue",    "brave",  "bright", "broad",   "calm",
    "clever", "cold",    "crimson", "curious", "dark",   "deep",   "distant", "eager",
    "early",  "empty",   "faint",   "fair",    "gentle", "golden", "grand",   "green",
    "heavy",  "hidden",  "hollow",  "humble",  "idle",   "jolly",  "keen",    "late",
    "lively", "lonely",  "loud",    "mellow",  "mild",   "narrow", "noble",   "odd",
    "pale",   "patient", "plain",   "proud",   "quick",  "quiet",  "rapid",   "rare",
    "rough",  "round",   "royal",   "sharp",   "silent", "silver", "simple",  "slow",
    "solid",  "steady",  "strange", "swift",   "tall",   "tender", "warm",    "wild"};
constexpr std::array kNouns = {
    "anchor", "apple",  "arrow",   "basket", "bell",   "bird",    "boat",    "bridge",
    "candle", "castle", "cloud",   "clock",  "coat",   "coin",    "desert",  "door",
    "eagle",  "engine", "feather", "field",  "fire",   "flower",  "forest",  "fountain",
    "garden", "gate",   "glass",   "hammer", "harbor", "hill",    "horse",   "island",
    "jacket", "kettle", "ladder",  "lake",   "lamp",   "lantern", "leaf",    "letter",
    "market", "meadow", "mirror",  "moon",   "needle", "ocean",   "orchard", "paper",
    "pebble", "pencil", "piano",   "pillow", "planet", "river",   "rope",    "saddle",
    "shadow", "spoon",  "stone",   "table",  "tower",  "valley",  "wheel",   "window"};

constexpr std::string_view kIntroduction =
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' "
    "and contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value. For each "
    "line "
    "index, memorize its corresponding <REGISTER_CONTENT>. At the end of the record, I will ask "
    "you "
    "to retrieve the corresponding <REGISTER_CONTENT> of a certain line index. Now the record "
    "start:\n\n";

struct Line {
  std::string index;
  std::uint32_t number = 0;
};

std::vector<Line> make_lines(std::size_t n_lines, std::uint64_t seed, std::uint32_t item) {
  Philox random(seed, /*layer=*/0, item);
  std::vector<Line> lines;
  std::set<std::string> used;
  while (lines.size() < n_lines) {
    const std::string index = fmt::format("{}-{}", kAdjectives[random.below(kAdjectives.size())],
                                          kNouns[random.below(kNouns.size())]);
    if (used.insert(index).second) {
      lines.push_back({index, 1 + random.below(kMaxNumber)});
    }
  }
  return lines;
}

std::string question(const std::string& index) {
  return fmt::format(
      "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {}? "
      "I need the number.",
      index);
}

class LinesTask final : public Task {
 public:
  explicit LinesTask(const TaskOptions& options) : options_(options) {}

  Status read_files() {
    constexpr std::array kKeys = {"prompt"};
    Expected<std::vector<DataItem>> items = read_items(options_.files, options_, kKeys);
    if (!items) {
      return items.error();
    }
    for (const DataItem& item : *items) {
      const auto index = item.fields.find("random_idx");
      const auto number = item.fields.find("expected_number");
      if (index == item.fields.end() || !index->is_array() || index->empty() ||
          !index->front().is_string() || number == item.fields.end() ||
          !number->is_number_unsigned() || number->get<std::uint64_t>() > UINT32_MAX) {
        return corrupt(item.id() + ": no random_idx and expected_number, as LongEval's lines have");
      }
      add(item.id(), item.text("prompt"), index->front(), number->get<std::uint32_t>());
    }
    return ok_status();
  }

  void make_up() {
    const std::size_t n_items = options_.max_items == 0 ? kDefaultItems : options_.max_items;
    for (std::uint32_t item = 0; item < n_items; ++item) {
      const std::vector<Line> lines = make_lines(options_.n_lines, options_.seed, item);
      std::string text(kIntroduction);
      for (const Line& line : lines) {
        text += fmt::format("line {}: REGISTER_CONTENT is <{}>\n", line.index, line.number);
      }
      Philox random(options_.seed, /*layer=*/1, item);
      const Line& asked = lines[random.below(static_cast<std::uint32_t>(lines.size()))];
      add(fmt::format("{} lines:{}", options_.n_lines, item), text + question(asked.index),
          asked.index, asked.number);
    }
  }

  Expected<std::optional<Score>> score(std::size_t prompt, const Answer& answer,
                                       const Answer& /*reference*/) const override {
    // A cued answer begins with the number; in a conversation it comes last, as LongEval has it.
    const std::vector<double> found = numbers_in(answer.text);
    const bool is_right =
        !found.empty() && (options_.is_chat ? found.back() : found.front()) == numbers_[prompt];
    return std::optional(Score{is_right ? 1.0 : 0.0, {}});
  }

 private:
  void add(std::string id, std::string text, const std::string& index, std::uint32_t number) {
    Prompt prompt;
    prompt.id = std::move(id);
    prompt.text = std::move(text);
    prompt.is_chat = options_.is_chat;
    prompt.max_tokens = options_.is_chat ? kChatTokens : kCuedTokens;
    if (!options_.is_chat) {  // the line again, up to its number: even weak models can go on
      prompt.text += fmt::format("\n\nline {}: REGISTER_CONTENT is <", index);
      prompt.stops = {">", "\n"};
    }
    prompts_.push_back(std::move(prompt));
    numbers_.push_back(number);
  }

  TaskOptions options_;
  std::vector<std::uint32_t> numbers_;
};

}  // namespace

Expected<std::unique_ptr<Task>> make_lines_task(const TaskOptions& options) {
  if (options.n_lines == 0 || options.n_lines > kAdjectives.size() * kNouns.size() / 2) {
    return invalid_argument(fmt::format("a record has 1 to {} lines, {} are asked for",
                                        kAdjectives.size() * kNouns.size() / 2, options.n_lines));
  }
  auto task = std::make_unique<LinesTask>(options);
  if (options.files.empty()) {
    task->make_up();
  } else if (Status read = task->read_files(); !read) {
    return read.error();
  }
  return std::unique_ptr<Task>(std::move(task));
}

}  // namespace zipcache::eval
