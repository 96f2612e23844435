// Tasks that ask prompts: each is read and answered with the likeliest tokens, under one policy
// after the other.
#pragma once

#include <span>
#include <vector>

#include "cli/eval_caches.h"
#include "cli/eval_options.h"
#include "cli/eval_progress.h"
#include "eval/journal.h"
#include "eval/task.h"

namespace zipcache::cli {

// The prompts as tokens, cut where they may be, and the context that the longest takes with its
// answer. An error when one is too long for options.n_ctx (0 = what the model was trained for).
struct PreparedPrompts {
  std::vector<std::vector<llama_token>> tokens;
  std::uint32_t n_ctx = 0;
};
Expected<PreparedPrompts> prepare_prompts(const Model& model, const eval::Task& task,
                                          const EvalOptions& options);

// Adds the samples that the journal lacks.
Expected<Progress> run_prompts(const EvalCaches& caches, std::span<const eval::PolicySpec> policies,
                               const eval::Task& task, const PreparedPrompts& prepared,
                               const EvalOptions& options, eval::Journal& journal,
                               EvalProgress& progress);

}  // namespace zipcache::cli
