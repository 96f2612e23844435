#include "saliency/probes.h"

#include <algorithm>
#include <numeric>

#include "base/philox.h"

namespace zipcache::saliency {
namespace {

constexpr std::uint32_t kShare = 20;         // one half of the probes is 1/20 = 5 % of the rows
constexpr std::uint32_t kAllRowsBelow = 65;  // chunks this short are probed whole
constexpr std::uint32_t kMinHalf = 16;       // so that 32 rows at least decide on a longer chunk

// Rows [n_rows - n_recent, n_rows) and n_random of the rows before them.
struct ProbeCounts {
  std::uint32_t n_recent = 0;
  std::uint32_t n_random = 0;
  bool with_replacement = false;
};

ProbeCounts count_probes(ProbeRule rule, std::uint32_t n_rows) {
  // The published code takes int(L - .05 * L) and int(.05 * L) in doubles; these integers are the
  // same for every L below two million.
  const std::uint32_t share_up = n_rows / kShare + (n_rows % kShare != 0 ? 1 : 0);
  const std::uint32_t share_down = n_rows / kShare;
  if (rule == ProbeRule::kLast) {
    return {1, 0};
  }
  if (rule == ProbeRule::kOfficial) {
    return {share_up, share_down, /*with_replacement=*/true};
  }
  if (rule == ProbeRule::kAll || n_rows < kAllRowsBelow) {
    return {n_rows, 0};
  }
  const std::uint32_t n_recent = std::max(share_up, kMinHalf);
  const std::uint32_t n_random = std::max(share_down, kMinHalf);
  if (rule == ProbeRule::kRecent) {
    return {n_recent + n_random, 0};
  }
  if (rule == ProbeRule::kRandom) {
    return {0, n_recent + n_random};
  }
  return {n_recent, n_random};
}

}  // namespace

std::vector<std::uint32_t> select_probes(ProbeRule rule, std::uint32_t n_rows,
                                         const ProbeKey& key) {
  std::vector<std::uint32_t> rows;
  select_probes(rule, n_rows, key, &rows);
  return rows;
}

void select_probes(ProbeRule rule, std::uint32_t n_rows, const ProbeKey& key,
                   std::vector<std::uint32_t>* chosen) {
  std::vector<std::uint32_t>& rows = *chosen;
  rows.clear();
  if (n_rows == 0) {
    return;
  }
  if (rule == ProbeRule::kSpecial) {
    for (const std::uint32_t position : key.special) {
      if (position >= key.ordinal && position - key.ordinal < n_rows) {
        rows.push_back(position - key.ordinal);
      }
    }
    return;
  }
  const ProbeCounts counts = count_probes(rule, n_rows);
  const std::uint32_t n_others = n_rows - counts.n_recent;
  Philox random(key.seed, key.layer, key.ordinal);

  rows.reserve(std::max(n_others, counts.n_random) + counts.n_recent);
  if (counts.with_replacement) {
    for (std::uint32_t draw = 0; draw < counts.n_random; ++draw) {
      rows.push_back(random.below(n_others));
    }
  } else if (counts.n_random > 0) {  // the first n_random steps of a Fisher-Yates shuffle
    rows.resize(n_others);
    std::iota(rows.begin(), rows.end(), 0u);
    for (std::uint32_t draw = 0; draw < counts.n_random; ++draw) {
      std::swap(rows[draw], rows[draw + random.below(n_others - draw)]);
    }
    rows.resize(counts.n_random);
  }
  std::sort(rows.begin(), rows.end());
  for (std::uint32_t row = n_others; row < n_rows; ++row) {
    rows.push_back(row);
  }
}

}  // namespace zipcache::saliency
