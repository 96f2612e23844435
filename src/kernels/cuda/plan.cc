#include "kernels/cuda/plan.h"

#include <algorithm>

#include "base/check.h"

namespace zipcache::cuda {
namespace {

// Items of the blocks, in the order of the blocks and, in a block, of the rows.
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
    n_blocks_ = static_cast<int>(
        std::clamp<std::int64_t>(total / input.min_block_bytes, 1, input.max_blocks));
    total_bytes_ = total;
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
    return page_bytes(input_.head_dim, cls.key_bits, cls.value_bits);
  }
  std::int64_t tail_weight() const {
    return input_.with_tail ? std::int64_t{input_.tail_tokens} * input_.head_dim * 4 : 0;
  }
  std::int64_t row_bytes(int row) const {
    std::int64_t bytes = input_.item_bytes + tail_weight();
    for (int page = input_.row_begin[row]; page < input_.row_begin[row + 1]; ++page) {
      bytes += page_weight(page);
    }
    return bytes;
  }
  // Where block `block` ends on the line of all bytes.
  std::int64_t block_end(int block) const { return total_bytes_ * (block + 1) / n_blocks_; }

  // Appends one item per block that the row reaches into. A page belongs to the block that holds
  // its middle; the tail to the row's last item.
  void cut_row(int row) {
    const std::size_t first_item = items_.size();
    position_ += input_.item_bytes;
    int begin = input_.row_begin[row];
    const int end = input_.row_begin[row + 1];
    while (block_ + 1 < n_blocks_ && position_ > block_end(block_)) {
      ++block_;
    }
    for (int page = begin; page < end; ++page) {
      const std::int64_t weight = page_weight(page);
      if (block_ + 1 < n_blocks_ && position_ + weight / 2 > block_end(block_)) {
        if (page > begin) {
          add_item(row, begin, page - begin);
          begin = page;
        }
        while (block_ + 1 < n_blocks_ && position_ + weight / 2 > block_end(block_)) {
          ++block_;
        }
      }
      position_ += weight;
    }
    add_item(row, begin, end - begin);
    items_.back().item.with_tail = input_.with_tail ? 1 : 0;
    position_ += tail_weight();

    const int n_parts = static_cast<int>(items_.size() - first_item);
    for (std::size_t at = first_item; at < items_.size(); ++at) {
      WorkItem& item = items_[at].item;
      item.n_partials = n_parts;
      item.first_partial = n_partials_;
      item.partial = n_partials_ + static_cast<int>(at - first_item);
    }
    if (n_parts > 1) {
      n_partials_ += n_parts;
    }
  }

  void add_item(int row, int first_page, int n_pages) {
    WorkItem item;
    item.row = row;
    item.first_page = first_page;
    item.n_pages = n_pages;
    items_.push_back({block_, item});
  }

  // The first item of block b becomes items[b]; the others follow behind and are chained.
  DecodePlan lay_out() const {
    DecodePlan plan;
    plan.n_partials = n_partials_;
    plan.n_blocks = n_blocks_;
    plan.items.resize(n_blocks_);
    for (WorkItem& item : plan.items) {
      item.row = -1;
    }
    std::vector<std::int32_t> last(n_blocks_, -1);  // where the block's latest item lies
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
  int n_blocks_ = 1;
  std::int64_t position_ = 0;
  int block_ = 0;
  std::vector<BlockItem> items_;
  int n_partials_ = 0;
};

}  // namespace

DecodePlan plan_decode(const PlanInput& input) {
  ZC_CHECK(input.row_begin.size() >= 2 && input.max_blocks > 0 && input.min_block_bytes > 0);
  return Planner(input).plan();
}

}  // namespace zipcache::cuda
