// Lines to the host's log. ggml hands them to the callback that the program has set (stderr when it
// has set none), so they look and go like the host's own.
#pragma once

#include <string>

namespace zipcache::ggml {

void log_error(const std::string& line);
void log_warning(const std::string& line);
// At most once per process for each text: for refusals, which the host asks about again and again.
void log_warning_once(const std::string& line);
void log_info(const std::string& line);

}  // namespace zipcache::ggml
