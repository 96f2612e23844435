#include "ggml/settings.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <optional>
#include <sstream>

namespace zipcache::ggml {
namespace {

constexpr std::string_view kPrefix = "ZIPCACHE_";

// Read by the build and the tests of this project, so users have them set; nothing to us.
constexpr std::string_view kIgnored[] = {"data",   "cache-dir", "llama-dir", "llama-build-dir",
                                         "plugin", "model",     "werror",    "cuda",
                                         "fuzz"};

bool is_ignored(std::string_view name) {
  return std::find(std::begin(kIgnored), std::end(kIgnored), name) != std::end(kIgnored);
}

bool is_known(std::string_view name, const std::vector<policy::SettingHelp>& settings) {
  return std::any_of(settings.begin(), settings.end(),
                     [&](const policy::SettingHelp& help) { return help.name == name; });
}

std::string list_of_names() {
  std::string names;
  for (const auto* settings : {&policy::setting_help(), &own_setting_help()}) {
    for (const policy::SettingHelp& help : *settings) {
      names += (names.empty() ? "" : ", ") + help.name;
    }
  }
  return names;
}

Expected<std::size_t> parse_limit(const std::string& value) {
  std::size_t mib = 0;
  const char* end = value.data() + value.size();
  const auto [stop, code] = std::from_chars(value.data(), end, mib);
  if (code != std::errc{} || stop != end || mib == 0 || mib > (SIZE_MAX >> 20)) {
    return invalid_argument("limit-mib: expected a whole number of MiB above 0, found '" + value +
                            "'");
  }
  return mib << 20;
}

Expected<policy::Calibration> read_calibration(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!(file && text << file.rdbuf())) {  // an empty file, too, leaves nothing to copy
    return invalid_argument("calibration: can't read " + path +
                            "; make it with: zipcache calibrate -m MODEL -o FILE");
  }
  Expected<policy::Calibration> calibration = policy::parse_calibration(text.str());
  if (!calibration) {
    return Error{calibration.error().code,
                 "calibration " + path + ": " + calibration.error().message};
  }
  return calibration;
}

}  // namespace

const std::vector<policy::SettingHelp>& own_setting_help() {
  static const std::vector<policy::SettingHelp> kHelp = {
      {"report", "stderr, 0, FILE",
       "where the byte table goes when the last KV cache is freed; a file gets JSON (default "
       "stderr)"},
      {"observe", "on, off",
       "on: the report also has the extremes of all channels, which zipcache calibrate reads "
       "(default off)"},
      {"limit-mib", "whole number above 0",
       "most MiB that all KV caches of the process may hold; beyond it decoding fails (default "
       "none)"},
      {"force-isa", "scalar, avx2, avxvnni, avx512",
       "instruction set of the kernels (default: the best of this machine)"},
  };
  return kHelp;
}

std::string variable_name(std::string_view setting) {
  std::string name(kPrefix);
  for (const char c : setting) {
    name += c == '-' ? '_' : c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  }
  return name;
}

Expected<SettingMap> settings_from_environment(const char* const* environment) {
  SettingMap values;
  for (; environment != nullptr && *environment != nullptr; ++environment) {
    const std::string_view entry = *environment;
    const std::size_t equals = entry.find('=');
    if (!entry.starts_with(kPrefix) || equals == std::string_view::npos) {
      continue;
    }
    std::string name;
    for (const char c : entry.substr(kPrefix.size(), equals - kPrefix.size())) {
      name += c == '_' ? '-' : c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    }
    if (is_ignored(name)) {
      continue;
    }
    if (!is_known(name, policy::setting_help()) && !is_known(name, own_setting_help())) {
      return invalid_argument("unknown variable " + std::string(entry.substr(0, equals)) +
                              "; known settings: " + list_of_names() +
                              " (as variables: " + variable_name("key-bits") + " and so on)");
    }
    values[name] = std::string(entry.substr(equals + 1));
  }
  return values;
}

Expected<SettingMap> settings_from_lines(std::string_view lines) {
  SettingMap values;
  while (!lines.empty()) {
    const std::size_t newline = lines.find('\n');
    const std::string_view line = lines.substr(0, newline);
    lines.remove_prefix(newline == std::string_view::npos ? lines.size() : newline + 1);
    if (line.empty()) {
      continue;
    }
    const std::size_t equals = line.find('=');
    const std::string name(line.substr(0, equals));
    if (equals == std::string_view::npos) {
      return invalid_argument("expected name=value, found '" + std::string(line) + "'");
    }
    if (!is_known(name, policy::setting_help()) && !is_known(name, own_setting_help())) {
      return invalid_argument("unknown setting '" + name + "'; known settings: " + list_of_names());
    }
    values[name] = std::string(line.substr(equals + 1));
  }
  return values;
}

Expected<Settings> make_settings(const SettingMap& values) {
  Settings settings;
  std::size_t limit = SIZE_MAX;
  SettingMap of_policy;
  for (const auto& [name, value] : values) {
    if (name == "report") {
      settings.report = value.empty() ? "stderr" : value;
    } else if (name == "observe") {
      if (value != "on" && value != "off") {
        return invalid_argument("observe: found '" + value + "', accepted: on, off");
      }
      settings.observes = value == "on";
    } else if (name == "force-isa") {
      settings.force_isa = value;
    } else if (name == "limit-mib") {
      Expected<std::size_t> parsed = parse_limit(value);
      if (!parsed) {
        return parsed.error();
      }
      limit = *parsed;
    } else {
      of_policy[name] = value;
    }
  }
  std::optional<policy::Calibration> calibration;
  if (const auto path = of_policy.find("calibration"); path != of_policy.end()) {
    Expected<policy::Calibration> read = read_calibration(path->second);
    if (!read) {
      return read.error();
    }
    calibration = std::move(*read);
  }
  Expected<policy::Policy> policy =
      policy::make_policy(of_policy, calibration ? &*calibration : nullptr);
  if (!policy) {
    return policy.error();
  }
  settings.policy = std::make_shared<const policy::Policy>(*policy);
  settings.budget = std::make_shared<cache::Budget>(limit);
  return settings;
}

}  // namespace zipcache::ggml
