// A cache as the evaluation commands name it: one word of the command line.
//
//   fp16, q8_0, q4_0    llama.cpp's own cache types; fp16 is what everything is compared with
//   default             the plug-in without settings
//   name=value,...      the plug-in with settings (names of policy::setting_help()); a value may
//   hold
//                       commas itself: key-bits=4,3,sinks=0
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/expected.h"

namespace zipcache::eval {

inline constexpr const char* kReferencePolicy = "fp16";

struct PolicySpec {
  std::string name;         // as the user wrote it
  std::string host_type{};  // "f16", "q8_0", "q4_0", or "" = the plug-in
  std::map<std::string, std::string> settings{};

  bool is_host() const { return !host_type.empty(); }
};

Expected<PolicySpec> parse_policy(const std::string& text);

// The reference first, whether named or not, then the others in order. An error when one is given
// twice.
Expected<std::vector<PolicySpec>> parse_policies(std::span<const std::string> texts);

}  // namespace zipcache::eval
