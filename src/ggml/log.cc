#include "ggml/log.h"

#include <mutex>
#include <set>

#include "ggml-impl.h"

namespace zipcache::ggml {
namespace {

struct Said {
  std::mutex mutex;
  std::set<std::string> lines;
};

Said& said() {
  static auto* const kSaid = new Said;  // never destroyed: hosts log from destructors
  return *kSaid;
}

}  // namespace

void log_error(const std::string& line) { GGML_LOG_ERROR("zipcache: %s\n", line.c_str()); }

void log_warning(const std::string& line) { GGML_LOG_WARN("zipcache: %s\n", line.c_str()); }

void log_warning_once(const std::string& line) {
  Said& all = said();
  const std::lock_guard lock(all.mutex);
  if (all.lines.insert(line).second) {
    log_warning(line);
  }
}

void allow_repeats() {
  Said& all = said();
  const std::lock_guard lock(all.mutex);
  all.lines.clear();
}

void log_info(const std::string& line) { GGML_LOG_INFO("zipcache: %s\n", line.c_str()); }

}  // namespace zipcache::ggml
