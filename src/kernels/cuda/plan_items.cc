#include "kernels/cuda/plan_items.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "kernels/cuda/decode_config.h"

namespace zipcache::cuda {
namespace {

// Pages of a part whose scale sets are folded together.
struct Group {
  std::vector<WorkItem::Fold> folds;  // a set each
  std::vector<int> pages;

  std::size_t fold_of(int set) const {  // folds.size(): of none
    return static_cast<std::size_t>(std::ranges::find(folds, set, &WorkItem::Fold::set) -
                                    folds.begin());
  }
};

// Pages that follow each other in the list, of one class and set, full up to the last.
struct Run {
  int first = 0, n_pages = 0;
  bool full = true;
};

class Part {
 public:
  Part(const PlanInput& input, int row) : input_(input), row_(row) {}

  std::vector<WorkItem> items(std::span<const int> pages, bool with_tail, bool reversed) const {
    const int n_folds = max_folds(input_.group) - (with_tail ? 1 : 0);
    std::vector<WorkItem> items;
    std::size_t last_fold = 0;
    for (const Group& group : groups(pages, static_cast<std::size_t>(n_folds))) {
      last_fold = items.size();
      std::ranges::move(items_of(group, reversed), std::back_inserter(items));
      reversed = !reversed;  // the next begins with the class that this one ends with
    }
    items.back().bits |= kItemEndsPart;
    if (with_tail) {
      WorkItem& first = items[last_fold];
      const int at = item_folds(first.bits);
      items.back().bits |= kItemWithTail | static_cast<std::uint32_t>(at) << kItemTailFoldShift;
      first.folds[at] = fold_for(0, kTailClass);
      first.bits += 1u << kItemFoldsShift;
    }
    return items;
  }

 private:
  PageClass class_of(int page) const { return input_.classes[input_.pages[page].cls]; }
  static WorkItem::Fold fold_for(std::uint16_t set, PageClass cls) {
    return {set, static_cast<std::uint16_t>(item_class_bits(cls))};
  }

  std::vector<Group> groups(std::span<const int> pages, std::size_t n_folds) const {
    std::vector<Group> groups(1);
    for (const int page : pages) {
      const std::uint16_t set = input_.pages[page].set;
      if (groups.back().fold_of(set) == groups.back().folds.size()) {
        if (groups.back().folds.size() == n_folds) {
          groups.emplace_back();
        }
        groups.back().folds.push_back(fold_for(set, class_of(page)));
      }
      groups.back().pages.push_back(page);
    }
    return groups;
  }

  // Class by class: code changes at few places, and most warps have work in an item although runs
  // of a set may be shorter than a tile for each (8 x 8k in blocks of 512: 28.0 us with an item per
  // run, in the order of the pages, 23.8 so).
  std::vector<WorkItem> items_of(const Group& group, bool reversed) const {
    std::vector<WorkItem> items;
    for (std::size_t n = 0; n < input_.classes.size(); ++n) {
      const std::size_t cls = reversed ? input_.classes.size() - 1 - n : n;
      add_class(group, static_cast<int>(cls), items);
    }
    if (items.empty()) {
      items.push_back(item_of({}, group));
    }
    items.front().bits |= kItemFolds | static_cast<std::uint32_t>(group.folds.size())
                                           << kItemFoldsShift;
    std::ranges::copy(group.folds, items.front().folds);
    return items;
  }

  std::vector<Run> runs_of(const Group& group, int cls) const {
    std::vector<Run> runs;
    for (const int page : group.pages) {
      const PageEntry entry = input_.pages[page];
      if (entry.cls != cls) {
        continue;
      }
      if (runs.empty() || !runs.back().full || page != runs.back().first + runs.back().n_pages ||
          entry.set != input_.pages[runs.back().first].set) {
        runs.push_back({page});
      }
      ++runs.back().n_pages;
      runs.back().full = entry.tokens == kPageTokens;
    }
    return runs;
  }

  // A run that fills an item is one; shorter ones share items. Tile n of an item is warp n's and
  // that of n + all warps is too, so page p and page p + half of the warps are of one set: pairs,
  // or a page without another.
  void add_class(const Group& group, int cls, std::vector<WorkItem>& items) const {
    std::vector<int> pairs, singles;  // their first pages
    for (const auto& [first, n_pages, full] : runs_of(group, cls)) {
      if (n_pages >= kItemPages || !full) {
        std::vector<int> pages(n_pages);
        std::iota(pages.begin(), pages.end(), first);
        items.push_back(item_of(pages, group));
        continue;
      }
      for (int n = 0; n < n_pages; n += 2) {
        (n + 1 < n_pages ? pairs : singles).push_back(first + n);
      }
    }
    const auto most = static_cast<std::size_t>(decode_warps(input_.head_dim) / kTilesPerPage);
    while (!pairs.empty() || !singles.empty()) {
      while (!pairs.empty() && pairs.size() + singles.size() < most) {  // a page for every warp
        singles.insert(singles.end(), {pairs.back(), pairs.back() + 1});
        pairs.pop_back();
      }
      const auto end_of_pairs = pairs.begin() + std::min(pairs.size(), most);
      std::vector<int> pages(pairs.begin(), end_of_pairs);
      const auto end_of_singles = singles.begin() + std::min(singles.size(), most - pages.size());
      pages.insert(pages.end(), singles.begin(), end_of_singles);
      std::transform(pairs.begin(), end_of_pairs, std::back_inserter(pages),
                     [](int page) { return page + 1; });
      items.push_back(item_of(pages, group));
      pairs.erase(pairs.begin(), end_of_pairs);
      singles.erase(singles.begin(), end_of_singles);
    }
  }

  WorkItem item_of(std::span<const int> pages, const Group& group) const {
    WorkItem item;
    item.row = row_;
    item.sequence = row_ / input_.n_kv_heads;
    item.first_set = input_.set_base[row_];
    item.n_pages = static_cast<int>(pages.size());
    for (std::size_t n = 0; n < pages.size(); ++n) {
      const PageEntry entry = input_.pages[pages[n]];
      item.n_tokens += entry.tokens;
      if (n < kItemPages) {
        item.pages[n].unit = entry.unit;
        item.page_folds |= static_cast<std::uint32_t>(group.fold_of(entry.set)) << kFoldBits * n;
      }
    }
    if (!pages.empty()) {
      const PageClass cls = class_of(pages.front());
      item.first_page = pages.front();
      item.bits = item_class_bits(cls);
      item.tile_bytes = tile_bytes(input_.head_dim, cls);
      item.value_offset = tile_value_offset(input_.head_dim, cls);
    }
    return item;
  }

  const PlanInput& input_;
  int row_;
};

}  // namespace

std::vector<WorkItem> items_of_part(const PlanInput& input, int row, std::span<const int> pages,
                                    bool with_tail, bool reversed) {
  return Part(input, row).items(pages, with_tail, reversed);
}

}  // namespace zipcache::cuda
