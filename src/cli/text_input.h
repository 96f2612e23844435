// The text a run reads: a file, standard input, or nothing but the prompt.
#pragma once

#include <string>

#include "base/expected.h"

namespace zipcache::cli {

// All of a file; "-" is standard input. An error names the file and the cause.
Expected<std::string> read_text(const std::string& path);

bool is_stdin_terminal();

}  // namespace zipcache::cli
