// `zipcache bench op`: attention alone, beside ggml_flash_attn_ext over llama.cpp's cache types on
// the same tokens, in turn, in the same thread pool.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/expected.h"
#include "bench/host_attention.h"
#include "bench/record.h"

namespace zipcache::bench {

struct OpOptions {
  std::vector<AttentionShape> shapes;
  std::vector<std::uint32_t> n_kv{1024, 4096, 16384};
  std::vector<std::uint32_t> n_query{1};  // newest tokens that attend; skipped where above n_kv
  std::vector<std::uint32_t> threads{1};
  std::vector<std::string> peers{"f16", "q8_0", "q4_0"};
  std::uint32_t rounds = 9;
  bool is_warm = false;  // leave the processor's caches as the round before left them
  std::string isa;       // "" = the best
  std::map<std::string, std::string> settings;
};

// Prints a row per point and adds a record as it is measured.
Status bench_op(const OpOptions& options, const Records& records);

}  // namespace zipcache::bench
