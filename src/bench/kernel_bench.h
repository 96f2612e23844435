// `zipcache bench kernels`: the product with packed codes, by width, shape and instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/expected.h"
#include "bench/record.h"

namespace zipcache::bench {

struct KernelOptions {
  std::vector<std::string> isas;                 // empty: all that this machine can run
  std::vector<int> widths{2, 3, 4, 8, 16};       // bits of a code; 16 is fp16
  std::vector<std::uint32_t> rows{1, 4, 8, 64};  // of x: query heads of a group times queries
  std::vector<std::uint32_t> dims{64, 128};      // head sizes
  std::uint32_t n_tokens = 512;                  // of a block
  std::uint32_t rounds = 7;
  bool is_warm = false;  // all matrices in the first-level cache, not in memory
};

// Prints a row per point and adds a record as it is measured.
Status bench_kernels(const KernelOptions& options, const Records& records);

}  // namespace zipcache::bench
