// Lines to the host's log. ggml hands them to the callback that the program has set (stderr when it
// has set none), so they look and go like the host's own.
#pragma once

#include <string>

namespace zipcache::ggml {

void log_error(const std::string& line);
void log_warning(const std::string& line);
// For refusals, which the host asks about again and again: a text is repeated only after
// allow_repeats(). Call that for each new context: the host mutes its log while it measures.
void log_warning_once(const std::string& line);
void allow_repeats();
void log_info(const std::string& line);

}  // namespace zipcache::ggml
