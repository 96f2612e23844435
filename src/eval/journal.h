// The folder of a run: run_meta.json says what was asked, samples.jsonl holds what is done so far,
// one line per policy and item, written at once. Asking for the same again goes on where it
// stopped.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/expected.h"
#include "eval/sample.h"

namespace zipcache::eval {

class Journal {
 public:
  // `folder` "" keeps nothing. `identity` is what makes samples comparable (model, data, options):
  // where the folder holds another run, the error names what differs. `description` is stored
  // beside it (command, versions, date) and may differ. A last line that was cut off is dropped.
  static Expected<Journal> open(const std::string& folder, const nlohmann::ordered_json& identity,
                                const nlohmann::ordered_json& description);

  // nullptr if there is none yet.
  const Sample* find(const std::string& policy, const std::string& item) const;
  Status add(Sample sample);

  const std::vector<Sample>& samples() const { return samples_; }

 private:
  Status read_samples(const std::string& path);

  std::vector<Sample> samples_;
  std::ofstream file_;
  std::string path_;
};

// Writes a file of the folder as a whole.
Status write_file(const std::string& path, const std::string& text);

}  // namespace zipcache::eval
