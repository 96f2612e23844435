// Evaluation data: where it is and what is in it.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/expected.h"

namespace zipcache::eval {

// `name` as given if it exists, else inside `folder`; "" = ../shared/data beside the folder that
// holds build/. An error says where it was looked for.
Expected<std::string> find_data(const std::string& folder, const std::string& name);

// The whole file; unpacked if its name ends in .gz.
Expected<std::string> read_data(const std::string& path);

// One JSON object per line. An error names file and line.
Expected<std::vector<nlohmann::json>> read_json_lines(const std::string& path);

// Size and xxHash64 of a file, "123:0123456789abcdef": tells whether it is still the same.
Expected<std::string> fingerprint(const std::string& path);

// File name without folders and ".gz".
std::string data_name(const std::string& path);

}  // namespace zipcache::eval
