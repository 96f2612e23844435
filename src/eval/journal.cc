#include "eval/journal.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "eval/data_file.h"

namespace zipcache::eval {
namespace {

namespace fs = std::filesystem;

// "n_ctx was 512 and is now 1024", or "" when nothing differs.
std::string difference(const nlohmann::json& before, const nlohmann::json& now) {
  for (const auto& [key, value] : now.items()) {
    const auto old = before.find(key);
    if (old == before.end()) {
      return key + " was not known";
    }
    if (*old != value) {
      return key + " was " + old->dump() + " and is now " + value.dump();
    }
  }
  return before.size() == now.size() ? "" : "it had more options";
}

}  // namespace

Status write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  if (!file.flush()) {
    return invalid_argument("can't write " + path + ": " + std::strerror(errno));
  }
  return ok_status();
}

Expected<Journal> Journal::open(const std::string& folder, const nlohmann::ordered_json& identity,
                                const nlohmann::ordered_json& description) {
  Journal journal;
  if (folder.empty()) {
    return journal;
  }
  std::error_code failed;
  fs::create_directories(folder, failed);
  if (failed) {
    return invalid_argument("can't make the folder " + folder + ": " + failed.message());
  }
  const std::string meta_path = (fs::path(folder) / "run_meta.json").string();
  journal.path_ = (fs::path(folder) / "samples.jsonl").string();
  if (fs::exists(meta_path, failed)) {
    const Expected<std::string> text = read_data(meta_path);
    if (!text) {
      return text.error();
    }
    const auto meta = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (!meta.is_object() || !meta.contains("identity")) {
      return corrupt(meta_path + " does not describe a run");
    }
    if (const std::string differs = difference(meta["identity"], identity); !differs.empty()) {
      return invalid_argument(folder + " holds another run: " + differs +
                              "; choose another --out, or repeat what was asked");
    }
    if (Status read = journal.read_samples(journal.path_); !read) {
      return read.error();
    }
  } else {
    nlohmann::ordered_json meta = description;
    meta["identity"] = identity;
    if (Status written = write_file(meta_path, meta.dump(2) + "\n"); !written) {
      return written.error();
    }
  }
  journal.file_.open(journal.path_, std::ios::app);
  if (!journal.file_) {
    return invalid_argument("can't write " + journal.path_ + ": " + std::strerror(errno));
  }
  return journal;
}

Status Journal::read_samples(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return ok_status();  // stopped before the first sample
  }
  std::size_t n_good = 0;  // bytes of whole lines
  for (std::string line; std::getline(file, line);) {
    if (file.eof()) {
      break;  // no line end: the run stopped while writing it
    }
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    Expected<Sample> sample = json.is_discarded() ? corrupt("no JSON") : parse_sample(json);
    if (!sample) {
      return corrupt(path + ", line " + std::to_string(samples_.size() + 1) + ": " +
                     sample.error().message);
    }
    samples_.push_back(std::move(*sample));
    n_good += line.size() + 1;
  }
  file.close();
  std::error_code failed;
  fs::resize_file(path, n_good, failed);
  return failed ? Status(invalid_argument("can't write " + path + ": " + failed.message()))
                : ok_status();
}

const Sample* Journal::find(const std::string& policy, const std::string& item) const {
  const auto found = std::find_if(samples_.begin(), samples_.end(), [&](const Sample& sample) {
    return sample.item == item && sample.policy == policy;
  });
  return found == samples_.end() ? nullptr : &*found;
}

Status Journal::add(Sample sample) {
  if (file_.is_open()) {
    // Bytes of an answer that are no UTF-8 become U+FFFD.
    file_ << to_json(sample).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << '\n';
    if (!file_.flush()) {
      return invalid_argument("can't write " + path_ + ": " + std::strerror(errno));
    }
  }
  samples_.push_back(std::move(sample));
  return ok_status();
}

}  // namespace zipcache::eval
