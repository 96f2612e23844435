// What the user asked for, by environment variables (ZIPCACHE_KEY_BITS=4,3) or by the program that
// loaded the plug-in ("key-bits=4,3"). Every variable that begins with ZIPCACHE_ must be known: a
// misspelt setting is an error, not a default.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/expected.h"
#include "cache/bytes.h"
#include "policy/policy.h"

namespace zipcache::ggml {

struct Settings {
  std::shared_ptr<const policy::Policy> policy;
  std::shared_ptr<cache::Budget> budget;
  std::string force_isa;  // "" = automatic
  // Where the byte table goes when the last KV cache is freed: "stderr", "0" (nowhere) or a file.
  std::string report = "stderr";
  // Whether the report also says what a calibration is made of.
  bool observes = false;
};

// Values by setting name: lower case, '-' between words, no prefix.
using SettingMap = std::map<std::string, std::string>;

// The plug-in's own settings, beside policy::setting_help().
const std::vector<policy::SettingHelp>& own_setting_help();

// "key-bits" -> "ZIPCACHE_KEY_BITS"
std::string variable_name(std::string_view setting);

// The ZIPCACHE_ variables among "NAME=VALUE" strings (`environ`, null-terminated).
Expected<SettingMap> settings_from_environment(const char* const* environment);

// Lines of "name=value"; empty lines are skipped.
Expected<SettingMap> settings_from_lines(std::string_view lines);

// Reads the file that the setting `calibration` names, if it is among them.
Expected<Settings> make_settings(const SettingMap& values);

}  // namespace zipcache::ggml
