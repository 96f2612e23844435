// `zipcache run`: a model reads a text, answers, and the cost of its KV cache is shown.
#pragma once

#include "base/expected.h"
#include "cli/run_options.h"

namespace zipcache::cli {

enum class RunEnd { kDone, kInterrupted };

Expected<RunEnd> run(const RunOptions& options);

}  // namespace zipcache::cli
