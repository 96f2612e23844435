// libggml-zipcache.so as this program sees it: a ggml backend that is loaded at run time, as any
// other program would, and a few functions of its own.
#pragma once

#include <map>
#include <string>

#include "base/expected.h"
#include "ggml-backend.h"

namespace zipcache::cli {

class Plugin {
 public:
  // `path` "" looks in ../lib and in the directory of this executable. Loading sets up what all KV
  // caches of the process share; it happens once.
  static Expected<Plugin> load(const std::string& path);

  // Settings of KV caches made from now on: names as in policy::setting_help().
  Status configure(const std::map<std::string, std::string>& settings) const;
  // JSON of what all KV caches hold now.
  std::string report_json() const { return report_json_(); }
  // JSON of versions and instruction sets; a plug-in that has none tells some in its report.
  std::string version_json() const {
    return version_json_ == nullptr ? report_json_() : version_json_();
  }

  ggml_backend_dev_t device() const { return device_; }
  const std::string& path() const { return path_; }

 private:
  using TextFunction = const char* (*)();
  using ConfigureFunction = const char* (*)(const char* lines);

  Plugin() = default;

  std::string path_;
  ggml_backend_dev_t device_ = nullptr;
  ConfigureFunction configure_ = nullptr;
  TextFunction report_json_ = nullptr;
  TextFunction version_json_ = nullptr;
};

}  // namespace zipcache::cli
