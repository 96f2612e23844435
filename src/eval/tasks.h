// The tasks that make_task() knows. Each reads its data, writes its prompts and scores answers;
// internal to this room.
#pragma once

#include <nlohmann/json.hpp>

#include "eval/task.h"

namespace zipcache::eval {

Expected<std::unique_ptr<Task>> make_lines_task(const TaskOptions& options);
Expected<std::unique_ptr<Task>> make_gsm8k_task(const TaskOptions& options);
Expected<std::unique_ptr<Task>> make_humaneval_task(const TaskOptions& options);
Expected<std::unique_ptr<Task>> make_longbench_task(const TaskOptions& options);
Expected<std::unique_ptr<Task>> make_agreement_task(const TaskOptions& options,
                                                    const Tokenizer& tokenizer);

// Objects of the files, at most options.max_items of each; every one has the
// keys as strings, or is an error that names it.
struct DataItem {
  std::string file;  // name
  std::size_t index = 0;
  nlohmann::json fields;

  std::string id() const { return file + ":" + std::to_string(index); }
  std::string text(const char* key) const { return fields.at(key).get<std::string>(); }
};
Expected<std::vector<DataItem>> read_items(std::span<const std::string> files,
                                           const TaskOptions& options,
                                           std::span<const char* const> text_keys);

}  // namespace zipcache::eval
