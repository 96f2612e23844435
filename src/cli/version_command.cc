#include "cli/version_command.h"

#include <fmt/format.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <vector>

#include "cli/host_log.h"
#include "cli/plugin.h"
#include "llama.h"

namespace zipcache::cli {
namespace {

void print_row(const char* name, const std::string& value) {
  fmt::print("{:<9} {}\n", name, value);
}

// `before`, a value of the plug-in's JSON (lists joined by spaces) and `after`; "" if it has none.
std::string part(const nlohmann::json& object, const char* key, const char* before = "",
                 const char* after = "") {
  const auto found = object.find(key);
  if (found == object.end()) {
    return "";
  }
  std::string text;
  if (found->is_array()) {
    text = fmt::format("{}", fmt::join(found->get<std::vector<std::string>>(), " "));
  } else {
    text = found->is_string() ? found->get<std::string>() : found->dump();
  }
  return before + text + after;
}

void print_plugin(const std::string& path) {
  const Expected<Plugin> plugin = Plugin::load(path);
  if (!plugin) {
    print_row("plug-in", "none: " + plugin.error().message);
    return;
  }
  const auto json = nlohmann::json::parse(plugin->version_json());
  print_row("plug-in", plugin->path() + part(json, "version", " ") +
                           part(json, "ggml_version", ", built with ggml ") +
                           part(json, "api_version", ", backend API "));
  print_row("kernels", part(json, "isa") + part(json, "isas", " (this machine can run: ", ")"));
}

void print_devices() {
  for (std::size_t index = 0; index < ggml_backend_dev_count(); ++index) {
    ggml_backend_dev_t device = ggml_backend_dev_get(index);
    print_row("device", fmt::format("{}: {}", ggml_backend_dev_name(device),
                                    ggml_backend_dev_description(device)));
  }
}

}  // namespace

const char* version() { return ZIPCACHE_VERSION; }

void print_version(const VersionOptions& options) {
  fmt::print("zipcache {}\n", version());
  if (!options.is_verbose) {
    return;
  }
  install_host_log(/*verbose=*/false);
  llama_backend_init();
  print_row("llama.cpp", fmt::format("{}, ggml {}", llama_version(), ggml_version()));
  print_plugin(options.plugin_path);
  print_devices();
}

}  // namespace zipcache::cli
