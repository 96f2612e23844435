// `zipcache eval`: what a compressed cache does to a model's predictions and answers, several
// policies beside FP16 in one run.
#pragma once

#include "base/expected.h"
#include "cli/eval_options.h"
#include "cli/run_command.h"

namespace zipcache::cli {

Expected<RunEnd> evaluate(EvalOptions options);

}  // namespace zipcache::cli
