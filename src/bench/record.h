// Measurements as JSON lines, keys as in docs/architecture.md.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/expected.h"

namespace zipcache::bench {

// What all records of a run share: {zipcache, llama.cpp, cpu, date}.
nlohmann::json run_meta(const std::string& command);

// Appends to a file, one line per record; "" writes nothing.
Status append_records(const std::string& path, const std::vector<nlohmann::json>& records);

}  // namespace zipcache::bench
