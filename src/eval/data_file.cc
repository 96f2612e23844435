#include "eval/data_file.h"

#include <fmt/format.h>
#include <xxhash.h>
#include <zlib.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>

namespace zipcache::eval {
namespace {

namespace fs = std::filesystem;

constexpr unsigned kReadBytes = 1 << 16;

// The data folder that a checkout of the project stands beside.
fs::path neighbour_folder() {
  std::error_code failed;
  const fs::path program = fs::read_symlink("/proc/self/exe", failed);
  for (fs::path folder = program.parent_path(); folder.has_relative_path();
       folder = folder.parent_path()) {
    if (folder.filename() == "build") {
      return folder.parent_path().parent_path() / "shared" / "data";
    }
  }
  return {};
}

struct CloseGzip {
  void operator()(gzFile file) const { gzclose(file); }
};

// Calls visit(bytes, n) for the pieces of a file; zlib passes plain files through.
template <typename Visit>
Status read_pieces(const std::string& path, Visit&& visit) {
  if (std::error_code ignored; fs::is_directory(path, ignored)) {
    return invalid_argument("can't read " + path + ": it is a directory");
  }
  const std::unique_ptr<gzFile_s, CloseGzip> file(gzopen(path.c_str(), "rb"));
  if (!file) {
    return invalid_argument("can't read " + path + ": " + std::strerror(errno));
  }
  std::string buffer(kReadBytes, '\0');
  int n_read = 0;
  while ((n_read = gzread(file.get(), buffer.data(), kReadBytes)) > 0) {
    visit(buffer.data(), static_cast<std::size_t>(n_read));
  }
  if (n_read < 0) {
    return corrupt("can't read " + path + ": its compressed data is damaged");
  }
  return ok_status();
}

}  // namespace

Expected<std::string> find_data(const std::string& folder, const std::string& name) {
  std::error_code failed;
  if (fs::exists(name, failed)) {
    return name;
  }
  const fs::path inside = folder.empty() ? neighbour_folder() : fs::path(folder);
  if (!inside.empty() && fs::exists(inside / name, failed)) {
    return (inside / name).string();
  }
  return invalid_argument("no file " + name +
                          (inside.empty() ? "" : " here or in " + inside.string()) +
                          "; set ZIPCACHE_DATA to the folder of the data");
}

Expected<std::string> read_data(const std::string& path) {
  std::string text;
  Status read = read_pieces(path, [&](const char* bytes, std::size_t n) { text.append(bytes, n); });
  if (!read) {
    return read.error();
  }
  return text;
}

Expected<std::vector<nlohmann::json>> read_json_lines(const std::string& path) {
  Expected<std::string> text = read_data(path);
  if (!text) {
    return text.error();
  }
  std::vector<nlohmann::json> objects;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text->size();) {
    const std::size_t end = std::min(text->find('\n', begin), text->size());
    const std::string_view line = std::string_view(*text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    nlohmann::json object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!object.is_object()) {
      return corrupt(fmt::format("{}, line {}: no JSON object", path, number));
    }
    objects.push_back(std::move(object));
  }
  if (objects.empty()) {
    return corrupt(path + " has no items");
  }
  return objects;
}

Expected<std::string> fingerprint(const std::string& path) {
  const std::unique_ptr<XXH64_state_t, XXH_errorcode (*)(XXH64_state_t*)> hash(XXH64_createState(),
                                                                               XXH64_freeState);
  XXH64_reset(hash.get(), 0);
  std::size_t size = 0;
  Status read = read_pieces(path, [&](const char* bytes, std::size_t n) {
    XXH64_update(hash.get(), bytes, n);
    size += n;
  });
  if (!read) {
    return read.error();
  }
  return fmt::format("{}:{:016x}", size, XXH64_digest(hash.get()));
}

std::string data_name(const std::string& path) {
  const fs::path file = fs::path(path).filename();
  return file.extension() == ".gz" ? file.stem().string() : file.string();
}

}  // namespace zipcache::eval
