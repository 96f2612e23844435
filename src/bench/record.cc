#include "bench/record.h"

#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>

#include "cli/version_command.h"
#include "llama.h"

namespace zipcache::bench {
namespace {

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) {
      return line.substr(line.find(": ") + 2);
    }
  }
  return "unknown";
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::string text(10, '\0');
  std::strftime(text.data(), text.size() + 1, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

}  // namespace

nlohmann::json run_meta(const std::string& command) {
  return {{"command", command},
          {"zipcache", cli::version()},
          {"llama.cpp", std::string("ggml ") + ggml_version()},
          {"cpu", cpu_model()},
          {"date", today()}};
}

Status Records::add(nlohmann::json record) const {
  if (path_.empty()) {
    return ok_status();
  }
  record["run"] = run_;
  std::ofstream file(path_, std::ios::app);
  file << record.dump() << '\n';
  file.close();
  return file ? ok_status()
              : Status(invalid_argument("can't write " + path_ + ": " + std::strerror(errno)));
}

}  // namespace zipcache::bench
