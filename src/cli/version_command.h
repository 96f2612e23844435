// `zipcache version`: what was built, what is loaded, what this machine offers.
#pragma once

#include <string>

namespace zipcache::cli {

struct VersionOptions {
  bool is_verbose = false;
  std::string plugin_path;
};

const char* version();
void print_version(const VersionOptions& options);

}  // namespace zipcache::cli
