#include "cli/text_input.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

namespace zipcache::cli {
namespace {

Expected<std::string> read_all(std::FILE* file, const std::string& name) {
  std::string text;
  char buffer[1 << 16];
  std::size_t n_read = 0;
  while ((n_read = std::fread(buffer, 1, sizeof buffer, file)) > 0) {
    text.append(buffer, n_read);
  }
  if (std::ferror(file) != 0) {
    return invalid_argument("can't read " + name + ": " + std::strerror(errno));
  }
  return text;
}

}  // namespace

Expected<std::string> read_text(const std::string& path) {
  if (path == "-") {
    return read_all(stdin, "standard input");
  }
  if (std::error_code ignored; std::filesystem::is_directory(path, ignored)) {
    return invalid_argument("can't read " + path + ": it is a directory");
  }
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             std::fclose);
  if (!file) {
    return invalid_argument("can't read " + path + ": " + std::strerror(errno));
  }
  return read_all(file.get(), path);
}

bool is_stdin_terminal() { return isatty(STDIN_FILENO) == 1; }

}  // namespace zipcache::cli
