#include <array>
#include <string>

#include "kernels/cpu/features.h"
#include "kernels/cpu/tables.h"
#include "kernels/kernels.h"

namespace zipcache::kernels {
namespace {

std::string missing_for_scalar() { return ""; }

struct Candidate {
  const KernelTable* table;
  std::string (*missing)();  // instruction sets that this machine lacks for it
};

// Best first.
constexpr std::array kCandidates = {
#if defined(ZIPCACHE_KERNELS_X86)
    Candidate{&avx512::kTable, missing_for_avx512},
    Candidate{&avxvnni::kTable, missing_for_avxvnni},
    Candidate{&avx2::kTable, missing_for_avx2},
#endif
    Candidate{&scalar::kTable, missing_for_scalar},
};

std::string built_in() {
  std::string names;
  for (const Candidate& candidate : kCandidates) {
    names.append(names.empty() ? "" : ", ").append(candidate.table->isa);
  }
  return names;
}

std::string runnable() {
  std::string names;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.missing().empty()) {
      names.append(names.empty() ? "" : ", ").append(candidate.table->isa);
    }
  }
  return names;
}

}  // namespace

Expected<const KernelTable*> select_kernels(std::string_view force) {
  for (const Candidate& candidate : kCandidates) {
    if (!force.empty() && force != candidate.table->isa) {
      continue;
    }
    const std::string missing = candidate.missing();
    if (missing.empty()) {
      return candidate.table;
    }
    if (!force.empty()) {
      return unsupported("kernels '" + std::string(force) +
                         "' were asked for, but this machine lacks " + missing +
                         "; it can run: " + runnable() + "; built in: " + built_in());
    }
  }
  return invalid_argument("kernels '" + std::string(force) +
                          "' are unknown; this machine can run: " + runnable() +
                          "; built in: " + built_in());
}

}  // namespace zipcache::kernels
