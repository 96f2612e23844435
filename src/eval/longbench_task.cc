// Files in the format of LongBench (v1): {"input", "context", "answers", "all_classes", ...} per
// line, the dataset named by the line or the file. Prompts and answer lengths come from its config.
#include <algorithm>
#include <array>
#include <functional>
#include <map>

#include "eval/data_file.h"
#include "eval/tasks.h"
#include "eval/text_metrics.h"

namespace zipcache::eval {
namespace {

using Texts = std::vector<std::string>;
using Metric = double (*)(std::string_view prediction, std::string_view truth,
                          const Texts& classes);

struct Dataset {
  Metric metric;
  bool is_chat = true;           // few-shot and code datasets are continued as they stand
  bool uses_first_line = false;  // of the prediction
};

double f1(std::string_view prediction, std::string_view truth, const Texts&) {
  return f1_score(prediction, truth);
}
double rouge(std::string_view prediction, std::string_view truth, const Texts&) {
  return rouge_l(prediction, truth);
}
double classification(std::string_view prediction, std::string_view truth, const Texts& classes) {
  return classification_score(prediction, truth, classes);
}
double number(std::string_view prediction, std::string_view truth, const Texts&) {
  return number_share(prediction, truth);
}
double code(std::string_view prediction, std::string_view truth, const Texts&) {
  return code_similarity(prediction, truth);
}

// The Chinese datasets are missing: their measures count words, which takes a dictionary.
const std::map<std::string, Dataset>& datasets() {
  static const std::map<std::string, Dataset> kAll = {
      {"narrativeqa", {f1}},
      {"qasper", {f1}},
      {"multifieldqa_en", {f1}},
      {"hotpotqa", {f1}},
      {"2wikimqa", {f1}},
      {"musique", {f1}},
      {"gov_report", {rouge}},
      {"qmsum", {rouge}},
      {"multi_news", {rouge}},
      {"trec", {classification, false, true}},
      {"triviaqa", {f1, false, true}},
      {"samsum", {rouge, false, true}},
      {"passage_count", {number}},
      {"passage_retrieval_en", {number}},
      {"lcc", {code, false}},
      {"repobench-p", {code, false}},
  };
  return kAll;
}

Expected<nlohmann::json> read_config(const std::string& folder, const std::string& name) {
  const Expected<std::string> path = find_data(folder, name);
  if (!path) {
    return path.error();
  }
  const Expected<std::string> text = read_data(*path);
  if (!text) {
    return text.error();
  }
  nlohmann::json config = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return corrupt(*path + " is no JSON object");
  }
  return config;
}

void replace(std::string& text, std::string_view place, const std::string& by) {
  if (const std::size_t at = text.find(place); at != std::string::npos) {
    text.replace(at, place.size(), by);
  }
}

class LongBenchTask final : public Task {
 public:
  Status add(const DataItem& item, const nlohmann::json& prompts, const nlohmann::json& lengths) {
    const std::string name = item.fields.contains("dataset") && item.fields["dataset"].is_string()
                                 ? item.text("dataset")
                                 : item.file.substr(0, item.file.rfind('.'));
    const auto dataset = datasets().find(name);
    if (dataset == datasets().end() || !prompts.contains(name) || !lengths.contains(name)) {
      std::string known;
      for (const auto& [each, unused] : datasets()) {
        known += (known.empty() ? "" : ", ") + each;
      }
      return invalid_argument(item.id() + ": unknown LongBench dataset '" + name +
                              "'; known: " + known);
    }
    if (!prompts[name].is_string() || !lengths[name].is_number_unsigned()) {
      return corrupt("LongBench's config has no text or no length for '" + name + "'");
    }
    const auto texts = [&](const char* key) {  // none: missing, or no list of texts
      const auto found = item.fields.find(key);
      const bool are_texts =
          found != item.fields.end() && found->is_array() &&
          std::all_of(found->begin(), found->end(), [](const auto& t) { return t.is_string(); });
      return are_texts ? found->get<Texts>() : Texts();
    };
    const Texts answers = texts("answers");
    if (answers.empty()) {
      return corrupt(item.id() + ": no answers");
    }
    Prompt prompt;
    prompt.id = item.id();
    prompt.text = prompts[name].get<std::string>();
    replace(prompt.text, "{input}", item.text("input"));
    replace(prompt.text, "{context}", item.text("context"));
    prompt.is_chat = dataset->second.is_chat;
    prompt.may_cut_middle = true;
    prompt.max_tokens = lengths[name].get<std::size_t>();
    if (name == "samsum") {
      prompt.stops = {"\n"};
    }
    prompts_.push_back(std::move(prompt));
    truths_.push_back({dataset->second, answers, texts("all_classes")});
    return ok_status();
  }

  Expected<std::optional<Score>> score(std::size_t prompt, const Answer& answer,
                                       const Answer& /*reference*/) const override {
    const Truth& truth = truths_[prompt];
    const std::string_view prediction =
        truth.dataset.uses_first_line ? first_line(answer.text) : std::string_view(answer.text);
    double best = 0;
    for (const std::string& expected : truth.answers) {
      best = std::max(best, truth.dataset.metric(prediction, expected, truth.classes));
    }
    return std::optional(Score{best, {}});
  }

 private:
  struct Truth {
    Dataset dataset;
    Texts answers;
    Texts classes;
  };
  std::vector<Truth> truths_;
};

}  // namespace

Expected<std::unique_ptr<Task>> make_longbench_task(const TaskOptions& options) {
  if (options.files.empty()) {
    return invalid_argument("longbench needs --data FILE..., in the format of LongBench");
  }
  const std::vector<std::string> config = default_files("longbench", false);
  const Expected<nlohmann::json> prompts = read_config(options.data_folder, config[0]);
  if (!prompts) {
    return prompts.error();
  }
  const Expected<nlohmann::json> lengths = read_config(options.data_folder, config[1]);
  if (!lengths) {
    return lengths.error();
  }
  constexpr std::array kKeys = {"input", "context"};
  const Expected<std::vector<DataItem>> items = read_items(options.files, options, kKeys);
  if (!items) {
    return items.error();
  }
  auto task = std::make_unique<LongBenchTask>();
  for (const DataItem& item : *items) {
    if (Status added = task->add(item, *prompts, *lengths); !added) {
      return added.error();
    }
  }
  return std::unique_ptr<Task>(std::move(task));
}

}  // namespace zipcache::eval
