// From samples to results: one record per policy, in the stable keys of docs/architecture.md, and
// the same as a Markdown table.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/expected.h"
#include "eval/journal.h"
#include "eval/task.h"

namespace zipcache::eval {

using Record = nlohmann::ordered_json;

// Of perplexity: samples with positions. `base` are the keys that all records share.
// REQUIRES: every policy has a sample of every item.
std::vector<Record> window_records(const Journal& journal, const std::vector<std::string>& policies,
                                   const std::vector<std::string>& items, const Record& base);

// Of a task with prompts, judged here. The first policy is the reference.
Expected<std::vector<Record>> prompt_records(const Journal& journal, const Task& task,
                                             const std::vector<std::string>& policies,
                                             const Record& base);

std::string to_markdown(const std::vector<Record>& records);

// llama-perplexity's closing lines for one policy.
std::string divergence_text(const Journal& journal, const std::string& policy);

}  // namespace zipcache::eval
