// The log of llama.cpp and ggml, one per process. Their chatter is dropped unless asked for;
// errors, and the plug-in's warnings, are kept until it is known whether they explain a failure.
#pragma once

#include <string>
#include <string_view>

namespace zipcache::cli {

// From now on llama.cpp and ggml log here. `verbose` prints every line as it comes.
void install_host_log(bool verbose);

// The most telling of the lines kept, or `fallback` when there is none; forgets them all.
std::string explain_failure(std::string_view fallback);

// True when the plug-in has said that it can't serve something. llama.cpp would go on, with a slow
// copy of the cache, and nobody would notice.
bool has_plugin_warning();

// Prints the lines kept (something went wrong, though nothing failed) and forgets them.
void print_kept_lines();

}  // namespace zipcache::cli
