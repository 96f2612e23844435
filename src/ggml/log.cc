#include "ggml/log.h"

#include <mutex>
#include <set>

#include "ggml-impl.h"

namespace zipcache::ggml {

void log_error(const std::string& line) { GGML_LOG_ERROR("zipcache: %s\n", line.c_str()); }

void log_warning(const std::string& line) { GGML_LOG_WARN("zipcache: %s\n", line.c_str()); }

void log_warning_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(line).second) {
    log_warning(line);
  }
}

void log_info(const std::string& line) { GGML_LOG_INFO("zipcache: %s\n", line.c_str()); }

}  // namespace zipcache::ggml
