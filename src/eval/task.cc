#include "eval/task.h"

#include <array>

#include "eval/data_file.h"
#include "eval/tasks.h"

namespace zipcache::eval {
namespace {

constexpr std::array<std::string_view, 5> kPromptTasks = {"lines", "gsm8k", "humaneval",
                                                          "longbench", "agreement"};

Expected<std::unique_ptr<Task>> make_own(const TaskOptions& options, const Tokenizer& tokenizer) {
  if (options.name == "lines") {
    return make_lines_task(options);
  }
  if (options.name == "gsm8k") {
    return make_gsm8k_task(options);
  }
  if (options.name == "humaneval") {
    return make_humaneval_task(options);
  }
  if (options.name == "longbench") {
    return make_longbench_task(options);
  }
  if (options.name == "agreement") {
    return make_agreement_task(options, tokenizer);
  }
  std::string known = "ppl";
  for (const std::string_view name : kPromptTasks) {
    known.append(", ").append(name);
  }
  return invalid_argument("unknown task '" + options.name + "'; known: " + known);
}

}  // namespace

std::span<const std::string_view> prompt_task_names() { return kPromptTasks; }

std::vector<std::string> default_files(std::string_view task, bool is_chat) {
  if (task == "gsm8k") {
    std::vector<std::string> files = {"gsm8k/test.jsonl"};
    if (!is_chat) {
      files.emplace_back("prompts/gear/gsm8k_prompt_original.txt");
    }
    return files;
  }
  if (task == "humaneval") {
    return {"humaneval/HumanEval.jsonl.gz"};
  }
  if (task == "longbench") {
    return {"longbench/config/dataset2prompt.json", "longbench/config/dataset2maxlen.json"};
  }
  if (task == "agreement" || task == "ppl") {
    return {"wikitext2/wiki.test.raw"};
  }
  return {};
}

Expected<std::unique_ptr<Task>> make_task(const TaskOptions& options, const Tokenizer& tokenizer) {
  Expected<std::unique_ptr<Task>> task = make_own(options, tokenizer);
  if (task && options.n_predict != 0) {
    (*task)->set_max_tokens(options.n_predict);
  }
  return task;
}

Expected<std::vector<DataItem>> read_items(std::span<const std::string> files,
                                           const TaskOptions& options,
                                           std::span<const char* const> text_keys) {
  std::vector<DataItem> items;
  for (const std::string& name : files) {
    const Expected<std::string> path = find_data(options.data_folder, name);
    if (!path) {
      return path.error();
    }
    Expected<std::vector<nlohmann::json>> objects = read_json_lines(*path);
    if (!objects) {
      return objects.error();
    }
    for (std::size_t index = 0; index < objects->size(); ++index) {
      if (options.max_items != 0 && index == options.max_items) {
        break;
      }
      DataItem item{data_name(*path), index, std::move((*objects)[index])};
      for (const char* key : text_keys) {
        if (const auto found = item.fields.find(key);
            found == item.fields.end() || !found->is_string()) {
          return corrupt(*path + ", item " + std::to_string(index + 1) + ": no text '" + key + "'");
        }
      }
      items.push_back(std::move(item));
    }
  }
  return items;
}

}  // namespace zipcache::eval
