// Measurements as JSON lines, keys as in docs/architecture.md.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "base/expected.h"

namespace zipcache::bench {

// What all records of a run share: {zipcache, llama.cpp, cpu, date}.
nlohmann::json run_meta(const std::string& command);

// A file that gets a line per record as it is measured: what ran an hour is not lost when the run
// is stopped. "" keeps nothing.
class Records {
 public:
  // Every record gets "run": `run`.
  Records(std::string path, nlohmann::json run) : path_(std::move(path)), run_(std::move(run)) {}
  Status add(nlohmann::json record) const;

 private:
  std::string path_;
  nlohmann::json run_;
};

}  // namespace zipcache::bench
