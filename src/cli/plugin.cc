#include "cli/plugin.h"

#include <cstdlib>
#include <filesystem>

#include "cli/host_log.h"

namespace zipcache::cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileName = "libggml-zipcache.so";

Expected<std::string> find_file() {
  std::error_code failed;
  const fs::path here = fs::read_symlink("/proc/self/exe", failed).parent_path();
  for (const fs::path& directory : {here.parent_path() / "lib", here}) {
    if (const fs::path file = directory / kFileName; fs::exists(file, failed)) {
      return file.string();
    }
  }
  return unsupported(std::string(kFileName) + " is neither in " +
                     (here.parent_path() / "lib").string() + " nor in " + here.string() +
                     "; name it with --plugin FILE or ZIPCACHE_PLUGIN");
}

template <typename Function>
bool find_function(ggml_backend_reg_t registry, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(ggml_backend_reg_get_proc_address(registry, name));
  return *function != nullptr;
}

}  // namespace

Expected<Plugin> Plugin::load(const std::string& path) {
  Plugin plugin;
  plugin.path_ = path;
  if (path.empty()) {
    Expected<std::string> found = find_file();
    if (!found) {
      return found.error();
    }
    plugin.path_ = *found;
  } else if (std::error_code ignored; !fs::exists(path, ignored)) {
    return invalid_argument("plug-in " + path + ": no such file");
  }

  ggml_backend_reg_t registry = ggml_backend_load(plugin.path_.c_str());
  if (registry == nullptr) {
    const std::string reason = explain_failure("ggml could not load it");
    const bool is_refusal = reason.find("returned NULL") != std::string::npos;
    return unsupported("plug-in " + plugin.path_ + ": " +
                       (is_refusal ? "not usable, for the reason above" : reason));
  }
  if (!find_function(registry, "zipcache_configure", &plugin.configure_) ||
      !find_function(registry, "zipcache_report_json", &plugin.report_json_) ||
      ggml_backend_reg_dev_count(registry) == 0) {
    return unsupported(plugin.path_ + " is not a ZipCache plug-in of this version");
  }
  find_function(registry, "zipcache_version_json", &plugin.version_json_);
  plugin.device_ = ggml_backend_reg_dev_get(registry, 0);
  return plugin;
}

Status Plugin::configure(const std::map<std::string, std::string>& settings) const {
  std::string lines;
  for (const auto& [name, value] : settings) {
    if (value.find('\n') != std::string::npos) {
      return invalid_argument(name + ": a value can't span lines");
    }
    lines.append(name).append("=").append(value).append("\n");
  }
  const char* error = configure_(lines.c_str());
  return error == nullptr ? ok_status() : Status(invalid_argument(error));
}

}  // namespace zipcache::cli
