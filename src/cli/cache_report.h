// What a run cost: bytes of the KV cache by part, speeds, and the two forms they are reported in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/expected.h"
#include "policy/calibration.h"

namespace zipcache::cli {

// `staging` holds the exact tokens: those not quantized yet, and with --plain all of them.
struct CacheBytes {
  std::size_t codes = 0;
  std::size_t params = 0;
  std::size_t masks = 0;
  std::size_t staging = 0;
  std::size_t slack = 0;
  std::size_t total = 0;
};

struct CacheReport {
  std::string policy;
  std::string isa;  // "" when llama.cpp does the work
  CacheBytes bytes;
  std::size_t fp16_bytes = 0;
  double ratio = 0.0;
  double bits_per_element = 0.0;
  std::uint64_t live_tokens = 0;
  double policy_seconds = 0.0;  // spent on saliency and sealing
};

// From the plug-in's JSON.
Expected<CacheReport> parse_report(const std::string& json);
// What an observed cache saw of the model's channels. kCorrupt if it was not observed.
Expected<policy::Calibration> parse_calibration_report(const std::string& json);
// llama.cpp's own FP16 cache.
CacheReport plain_report(std::size_t fp16_bytes, std::uint64_t live_tokens);

struct RunStatistics {
  std::string model;
  std::uint64_t seed = 0;
  int n_threads = 0;
  std::size_t n_prompt = 0;
  std::size_t n_generated = 0;
  double prefill_seconds = 0.0;
  std::size_t n_decoded = 0;  // generated tokens that were read back, one at a time
  double decode_seconds = 0.0;

  double prefill_tok_s() const { return prefill_seconds > 0 ? n_prompt / prefill_seconds : 0.0; }
  double decode_tok_s() const { return decode_seconds > 0 ? n_decoded / decode_seconds : 0.0; }
};

std::string to_table(const CacheReport& report, const RunStatistics& run);
// One object, keys as documented in docs/architecture.md.
std::string to_json(const CacheReport& report, const RunStatistics& run);

}  // namespace zipcache::cli
