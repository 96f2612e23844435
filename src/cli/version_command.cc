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

// A value of the plug-in's JSON as text, lists joined by spaces.
std::string text_of(const nlohmann::json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) {
    return "?";
  }
  if (found->is_array()) {
    return fmt::format("{}", fmt::join(found->get<std::vector<std::string>>(), " "));
  }
  return found->is_string() ? found->get<std::string>() : found->dump();
}

void print_plugin(const std::string& path) {
  const Expected<Plugin> plugin = Plugin::load(path);
  if (!plugin) {
    print_row("plug-in", "none: " + plugin.error().message);
    return;
  }
  const auto json = nlohmann::json::parse(plugin->version_json());
  print_row("plug-in", fmt::format("{} {}, built with ggml {}, backend API {}", plugin->path(),
                                   text_of(json, "version"), text_of(json, "ggml_version"),
                                   text_of(json, "api_version")));
  print_row("kernels", fmt::format("{} (this machine can run: {})", text_of(json, "isa"),
                                   text_of(json, "isas")));
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
