// Perplexity and divergence: every window of a text is read under the reference and then under each
// policy, which is compared with it position by position.
#pragma once

#include <span>

#include "cli/eval_caches.h"
#include "cli/eval_options.h"
#include "cli/eval_progress.h"
#include "eval/journal.h"
#include "eval/windows.h"

namespace zipcache::cli {

// The name of a window in samples.
std::string window_item(std::size_t index);

// Adds the samples that the journal lacks. REQUIRES: policies[0] is the reference; windows are not
// empty and of one length.
Expected<Progress> run_windows(const EvalCaches& caches, std::span<const eval::PolicySpec> policies,
                               std::span<const eval::Window> windows, const EvalOptions& options,
                               eval::Journal& journal, EvalProgress& progress);

}  // namespace zipcache::cli
