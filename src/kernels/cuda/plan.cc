#include "kernels/cuda/plan.h"

#include <algorithm>

#include "base/check.h"

namespace zipcache::cuda {
namespace {

// Items in the order of the rows.
struct BlockItem {
  int block = 0;
  WorkItem item;
};

class Planner {
 public:
  explicit Planner(const PlanInput& input) : input_(input) {
    std::int64_t total = 0;
    for (int row = 0; row < n_rows(); ++row) {
      total += row_bytes(row);
    }
    total_bytes_ = total;
    const auto bytes = static_cast<double>(total);
    n_large_ = static_cast<int>(
        std::clamp<std::int64_t>(total / input.min_block_bytes, 1, input.resident_blocks));
    large_bytes_ = bytes * input.large_share / n_large_;
    const int n_small =
        static_cast<int>(bytes * (1 - input.large_share) * input.small_divisor / large_bytes_);
    if (large_bytes_ < 1.0 * input.min_small_bytes * input.small_divisor || n_small == 0) {
      large_bytes_ = bytes / n_large_;
      n_blocks_ = n_large_;
    } else {
      n_blocks_ = n_large_ + n_small;
      small_bytes_ = (bytes - n_large_ * large_bytes_) / n_small;
    }
  }

  DecodePlan plan() {
    for (int row = 0; row < n_rows(); ++row) {
      cut_row(row);
    }
    return lay_out();
  }

 private:
  int n_rows() const { return static_cast<int>(input_.row_begin.size()) - 1; }
  std::int64_t page_weight(int page) const {
    const PageClass cls = input_.classes[input_.pages[page].cls];
    return page_bytes(input_.head_dim, cls.key_bits, cls.value_bits) +
           std::int64_t{kTilesPerPage} * input_.tile_bytes;
  }
  std::int64_t tail_weight() const {
    return input_.with_tail ? std::int64_t{input_.tail_tokens} * input_.head_dim * 4 : 0;
  }
  std::int64_t row_bytes(int row) const {
    std::int64_t bytes = input_.part_bytes + tail_weight();
    for (int page = input_.row_begin[row]; page < input_.row_begin[row + 1]; ++page) {
      bytes += page_weight(page);
    }
    return bytes;
  }
  // Where block `block` ends on the line of all bytes.
  std::int64_t block_end(int block) const {
    const int n_large = std::min(block + 1, n_large_);
    return static_cast<std::int64_t>(n_large * large_bytes_ + (block + 1 - n_large) * small_bytes_);
  }

  // Appends one part per block that the row reaches into. A page belongs to the block that holds
  // its middle; the tail to the row's last part.
  void cut_row(int row) {
    const std::size_t first_item = items_.size();
    int n_parts = 0;
    position_ += input_.part_bytes;
    int begin = input_.row_begin[row];
    const int end = input_.row_begin[row + 1];
    while (block_ + 1 < n_blocks_ && position_ > block_end(block_)) {
      ++block_;
    }
    for (int page = begin; page < end; ++page) {
      const std::int64_t weight = page_weight(page);
      if (block_ + 1 < n_blocks_ && position_ + weight / 2 > block_end(block_)) {
        if (page > begin) {
          add_part(row, begin, page, n_parts++);
          begin = page;
        }
        while (block_ + 1 < n_blocks_ && position_ + weight / 2 > block_end(block_)) {
          ++block_;
        }
      }
      position_ += weight;
    }
    add_part(row, begin, end, n_parts++);
    items_.back().item.bits |= input_.with_tail ? kItemWithTail : 0;
    position_ += tail_weight();

    for (std::size_t at = first_item; at < items_.size(); ++at) {
      items_[at].item.first_partial = n_partials_;
      items_[at].item.partial += n_partials_;
      items_[at].item.n_partials = n_parts;
    }
    if (n_parts > 1) {
      n_partials_ += n_parts;
    }
  }

  // Pages [begin, end) of a row as items of one class and set each, full up to the last page.
  void add_part(int row, int begin, int end, int part) {
    if (block_ != last_block_) {  // blocks that hold no page's middle are left out
      last_block_ = block_;
      ++n_used_blocks_;
    }
    do {
      WorkItem item;
      item.row = row;
      item.first_page = begin;
      item.partial = part;
      if (begin < end) {
        const PageEntry first = input_.pages[begin];
        const PageClass cls = input_.classes[first.cls];
        item.set = input_.set_base[row] + first.set;
        item.bits = cls.key_bits | cls.value_bits << 8;
        bool full = true;
        while (begin < end && full && input_.pages[begin].set == first.set &&
               input_.pages[begin].cls == first.cls) {
          const PageEntry page = input_.pages[begin++];
          if (item.n_pages < kItemPages) {
            item.pages[item.n_pages].unit = page.unit;
          }
          ++item.n_pages;
          item.n_tokens += page.tokens;
          full = page.tokens == kPageTokens;
        }
      }
      items_.push_back({n_used_blocks_ - 1, item});
    } while (begin < end);
    items_.back().item.bits |= kItemEndsPart;
  }

  // The first item of block b becomes items[b]; the others follow behind and are chained.
  DecodePlan lay_out() const {
    DecodePlan plan;
    plan.n_partials = n_partials_;
    plan.n_blocks = n_used_blocks_;
    plan.items.resize(n_used_blocks_);
    std::vector<std::int32_t> last(n_used_blocks_, -1);  // where the block's latest item lies
    for (const BlockItem& from : items_) {
      std::int32_t at = from.block;
      if (last[from.block] >= 0) {
        at = static_cast<std::int32_t>(plan.items.size());
        plan.items.emplace_back();
        plan.items[last[from.block]].next = at;
      }
      plan.items[at] = from.item;
      last[from.block] = at;
    }
    return plan;
  }

  const PlanInput& input_;
  std::int64_t total_bytes_ = 0;
  int n_blocks_ = 1, n_large_ = 1;
  double large_bytes_ = 0, small_bytes_ = 0;
  std::int64_t position_ = 0;
  int block_ = 0, last_block_ = -1, n_used_blocks_ = 0;
  std::vector<BlockItem> items_;
  int n_partials_ = 0;
};

}  // namespace

DecodePlan plan_decode(const PlanInput& input) {
  ZC_CHECK(input.row_begin.size() >= 2 && input.set_base.size() + 1 == input.row_begin.size());
  ZC_CHECK(input.resident_blocks > 0 && input.min_block_bytes > 0);
  return Planner(input).plan();
}

}  // namespace zipcache::cuda
