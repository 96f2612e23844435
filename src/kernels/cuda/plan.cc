#include "kernels/cuda/plan.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <span>
#include <utility>

#include "base/check.h"
#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/plan_items.h"

namespace zipcache::cuda {
namespace {

// Pages [begin, end) of a row; a block's pieces of a row stand together and are one part of it.
struct Piece {
  int row = 0, begin = 0, end = 0;
};
using Block = std::vector<Piece>;
// The kClusterBlocks blocks of a row that have nothing else, or one block.
using Cluster = std::vector<Block>;
// The blocks in the order of the launch: first those of clusters of several.
struct Line {
  std::vector<Block> blocks;
  std::size_t n_in_clusters = 0;
};
// Another class or scale set in a part of a row costs this much: folding the query again.
constexpr std::int64_t kItemBytes = 4 << 10;

class Planner {
 public:
  // `apart`: the tails have blocks of their own.
  Planner(const PlanInput& input, bool apart) : input_(input), apart_(apart) {
    bytes_.push_back(0);
    for (const PageEntry& page : input.pages) {
      bytes_.push_back(bytes_.back() + page_bytes(input.head_dim, input.classes[page.cls]));
    }
    for (int row = 0; row < n_rows(); ++row) {
      total_ += row_cost(row);
    }
    n_blocks_ = static_cast<int>(std::clamp<std::int64_t>(
        total_ / input.min_block_bytes, 1, input.resident_blocks - (apart ? n_rows() : 0)));
  }

  // Nothing if the tails are apart and there are more blocks than run at once, or so few that a
  // tail is no more work than the rest of its row.
  std::optional<DecodePlan> plan() {
    std::vector<Block> line = cut_line(), rows = cut_rows();
    // A few percent more in the longest block cost less than parts of two rows in many.
    std::vector<Block>& best = longest(rows) * 20 <= longest(line) * 21 ? rows : line;
    std::erase_if(best, [](const Block& block) { return block.empty(); });
    if (apart_ && best.size() <= static_cast<std::size_t>(n_rows())) {
      return std::nullopt;
    }
    for (int row = 0; apart_ && row < n_rows(); ++row) {
      const std::int32_t end = input_.row_begin[row + 1];
      if (end > input_.row_begin[row]) {
        best.push_back({{row, end, end}});
      }
    }
    if (apart_ && best.size() > static_cast<std::size_t>(input_.resident_blocks)) {
      return std::nullopt;
    }
    return lay_out(mix(clusters_of(std::move(best))));
  }

 private:
  int n_rows() const { return static_cast<int>(input_.row_begin.size()) - 1; }
  std::int64_t pages_cost(int begin, int end) const {
    return bytes_[end] - bytes_[begin] +
           std::int64_t{end - begin} * kTilesPerPage * input_.tile_bytes;
  }
  std::int64_t page_cost(int page) const { return pages_cost(page, page + 1); }
  std::int64_t tail_cost() const {
    if (!input_.with_tail || apart_) {
      return 0;
    }
    return input_.tail_bytes + std::int64_t{input_.tail_tokens} * input_.head_dim * 4;
  }
  std::int64_t piece_cost(const Piece& piece) const {
    const std::int64_t cost = input_.part_bytes + pages_cost(piece.begin, piece.end);
    return cost + (piece.end == input_.row_begin[piece.row + 1] ? tail_cost() : 0);
  }
  std::int64_t row_cost(int row) const {
    return piece_cost({row, input_.row_begin[row], input_.row_begin[row + 1]});
  }
  // What the device's slots wait for at the end, if they start together.
  std::int64_t longest(const std::vector<Block>& blocks) const {
    std::int64_t most = 0;
    for (const Block& block : blocks) {
      std::int64_t cost = 0;
      for (std::size_t n = 0; n < block.size(); ++n) {
        const bool same_part = n > 0 && block[n - 1].row == block[n].row;
        cost += piece_cost(block[n]) - (same_part ? input_.part_bytes - kItemBytes : 0);
      }
      most = std::max(most, cost);
    }
    const auto waves = static_cast<std::int64_t>((blocks.size() + input_.resident_blocks - 1) /
                                                 input_.resident_blocks);
    return most * waves;
  }

  // Equal cuts of the line of all rows. A page belongs to the block that holds its middle.
  std::vector<Block> cut_line() const {
    std::vector<Block> blocks(n_blocks_);
    std::int64_t position = 0;
    int block = 0;
    const auto advance_to = [&](std::int64_t at) {
      while (block + 1 < n_blocks_ && at * n_blocks_ > total_ * (block + 1)) {
        ++block;
      }
    };
    for (int row = 0; row < n_rows(); ++row) {
      position += input_.part_bytes;
      advance_to(position);
      Piece piece{row, input_.row_begin[row], input_.row_begin[row]};
      for (; piece.end < input_.row_begin[row + 1]; ++piece.end) {
        const std::int64_t cost = page_cost(piece.end);
        const int before = block;
        advance_to(position + cost / 2);
        if (block != before && piece.end > piece.begin) {
          blocks[before].push_back(piece);
          piece.begin = piece.end;
        }
        position += cost;
      }
      blocks[block].push_back(piece);
      position += tail_cost();
    }
    return blocks;
  }

  // The pages from `begin` on that a row's blocks share as one: a run of a class and scale set that
  // gives each block kSpreadPages, or everything up to such a run.
  int end_of_stretch(int begin, int end, int n_blocks) const {
    constexpr int kSpreadPages = 16;  // four tiles per warp: with fewer, warps end far apart
    const auto end_of_run = [&](int from) {
      const PageEntry first = input_.pages[from];
      int page = from;
      while (page < end && input_.pages[page].cls == first.cls &&
             input_.pages[page].set == first.set) {
        ++page;
      }
      return page;
    };
    int at = begin;
    do {
      const int run = end_of_run(at);
      if (run - at >= kSpreadPages * n_blocks) {
        return at > begin ? at : run;
      }
      at = run;
    } while (at < end);
    return end;
  }
  // Adds to each block of a row its equal share of the pages [begin, end).
  void spread(int row, int begin, int end, std::vector<Block>& blocks) const {
    double total = static_cast<double>(pages_cost(begin, end)), position = 0;
    if (end == input_.row_begin[row + 1]) {
      total += static_cast<double>(tail_cost());
    }
    Piece piece{row, begin, begin};
    for (std::size_t n = 1; n <= blocks.size(); ++n) {
      while (piece.end < end &&
             (n == blocks.size() ||
              position + static_cast<double>(page_cost(piece.end)) / 2 <=
                  total * static_cast<double>(n) / static_cast<double>(blocks.size()))) {
        position += static_cast<double>(page_cost(piece.end++));
      }
      if (piece.end > piece.begin) {
        blocks[n - 1].push_back(piece);
        piece.begin = piece.end;
      }
    }
  }

  // Long rows in equal pieces of about a block's share, short rows whole. Blocks of a row have
  // equal shares of each class too: what they wait for, memory or arithmetic, is then the same in
  // all.
  std::vector<Block> cut_rows() const {
    const double share = static_cast<double>(total_) / n_blocks_;
    std::vector<Block> blocks;
    double filled = share;  // of the block that takes short rows
    for (int row = 0; row < n_rows(); ++row) {
      const auto cost = static_cast<double>(row_cost(row));
      const int end = input_.row_begin[row + 1];
      const int n_pieces =
          std::min(static_cast<int>(cost / share + 0.25), end - input_.row_begin[row]);
      if (n_pieces <= 1) {
        if (filled + cost / 2 > share || cost > share) {
          blocks.emplace_back();
          filled = 0;
        }
        blocks.back().push_back({row, input_.row_begin[row], end});
        filled += cost;
        continue;
      }
      filled = share;
      std::vector<Block> pieces(n_pieces);
      for (int begin = input_.row_begin[row]; begin < end;) {
        const int until = end_of_stretch(begin, end, n_pieces);
        spread(row, begin, until, pieces);
        begin = until;
      }
      std::ranges::move(pieces, std::back_inserter(blocks));
    }
    return blocks;
  }

  // How many blocks have a part of each row.
  std::vector<std::int32_t> count_parts(std::span<const Block> blocks) const {
    std::vector<std::int32_t> n_parts(n_rows());
    for (const Block& block : blocks) {
      for (std::size_t n = 0; n < block.size(); n = part_end(block, n)) {
        ++n_parts[block[n].row];
      }
    }
    return n_parts;
  }
  static std::size_t part_end(const Block& block, std::size_t begin) {
    std::size_t end = begin;
    while (end < block.size() && block[end].row == block[begin].row) {
      ++end;
    }
    return end;
  }

  // Rows of kClusterBlocks blocks become clusters, if all run at once. With several clusters per
  // row there is a merge of these too: 1 x 32k took 13.6 us so, 13.0 with blocks by themselves.
  std::vector<Cluster> clusters_of(std::vector<Block> blocks) const {
    const bool fit =
        blocks.size() <= static_cast<std::size_t>(input_.resident_clusters) * kClusterBlocks;
    const std::vector<std::int32_t> n_parts = count_parts(blocks);
    std::vector<Cluster> clusters;
    for (auto first = blocks.begin(); first != blocks.end();) {
      const int row = first->front().row;
      const bool whole = fit && n_parts[row] == kClusterBlocks &&
                         blocks.end() - first >= kClusterBlocks &&
                         std::all_of(first, first + kClusterBlocks, [row](const Block& block) {
                           return block.front().row == row && block.back().row == row;
                         });
      const auto end = first + (whole ? kClusterBlocks : 1);
      clusters.emplace_back(std::make_move_iterator(first), std::make_move_iterator(end));
      first = end;
    }
    return clusters;
  }

  // Clusters of several blocks first. Of these and of the others, number n and n + half of them
  // share SMs: the widest codes, which wait for memory, meet the narrowest, which wait for
  // arithmetic, and a row's last block, which has the tail, meets another row's first.
  Line mix(std::vector<Cluster> clusters) const {
    const auto bytes_per_page = [&](const Cluster& cluster) {
      std::int64_t bytes = 0, pages = 0;
      for (const Block& block : cluster) {
        for (const Piece& piece : block) {
          bytes += bytes_[piece.end] - bytes_[piece.begin];
          pages += piece.end - piece.begin;
        }
      }
      return pages > 0 ? static_cast<double>(bytes) / static_cast<double>(pages) : 0.0;
    };
    const auto others =
        std::stable_partition(clusters.begin(), clusters.end(),
                              [](const Cluster& cluster) { return cluster.size() > 1; });
    for (const std::span<Cluster> part :
         {std::span(clusters.begin(), others), std::span(others, clusters.end())}) {
      std::ranges::stable_sort(part, std::greater(), bytes_per_page);
      const std::span<Cluster> second_half = part.last(part.size() / 2);
      std::ranges::reverse(second_half);
      std::ranges::for_each(second_half, [](Cluster& cluster) { std::ranges::reverse(cluster); });
    }
    Line line;
    for (Cluster& cluster : clusters) {
      line.n_in_clusters += cluster.size() > 1 ? cluster.size() : 0;
      std::ranges::move(cluster, std::back_inserter(line.blocks));
    }
    return line;
  }

  // Whether block `n` is in the second half of those that it may share an SM with.
  static bool in_second_half(const Line& line, std::size_t n) {
    const std::size_t clustered = line.n_in_clusters, others = line.blocks.size() - clustered;
    if (n < clustered) {
      return n / kClusterBlocks >= clustered / kClusterBlocks / 2;
    }
    return n - clustered >= others / 2;
  }
  // A block's part of a row: pieces of the block. In the second half of the blocks the classes
  // stand the other way round: of two blocks that share an SM, one waits for memory while the
  // other, in narrower codes, waits for arithmetic.
  std::vector<WorkItem> part_of(std::span<const Piece> part, bool reversed) const {
    std::vector<int> pages;
    bool with_tail = false;
    for (const Piece& piece : part) {
      for (int page = piece.begin; page < piece.end; ++page) {
        pages.push_back(page);
      }
      with_tail |= has_tail(piece);
    }
    return items_of_part(input_, part.front().row, pages, with_tail, reversed);
  }
  bool has_tail(const Piece& piece) const {
    return piece.end == input_.row_begin[piece.row + 1] && input_.with_tail &&
           (!apart_ || piece.begin == piece.end);
  }

  // The items of block b are items[b * kItemGroup] and so on, one group; the others follow behind,
  // in groups of the block's own.
  DecodePlan lay_out(const Line& line) const {
    const std::vector<Block>& blocks = line.blocks;
    // Without those in clusters, which leave 0: WorkItem::n_partials.
    const std::vector<std::int32_t> n_parts =
        count_parts(std::span(blocks).subspan(line.n_in_clusters));
    std::vector<std::int32_t> next_partial(n_rows());
    DecodePlan plan;
    for (int row = 0; row < n_rows(); ++row) {
      next_partial[row] = plan.n_partials;
      plan.n_partials += n_parts[row] > 1 ? n_parts[row] : 0;
    }
    const std::vector<std::int32_t> first_partial = next_partial;
    plan.cluster_blocks = line.n_in_clusters > 0 ? kClusterBlocks : 1;
    plan.n_blocks = std::max(static_cast<int>(blocks.size()), input_.n_blocks);
    plan.n_blocks =
        (plan.n_blocks + plan.cluster_blocks - 1) / plan.cluster_blocks * plan.cluster_blocks;
    plan.items.reserve(static_cast<std::size_t>(plan.n_blocks) * kItemGroup * 2);
    plan.items.resize(static_cast<std::size_t>(plan.n_blocks) * kItemGroup);
    for (std::size_t block = 0; block < blocks.size(); ++block) {
      std::size_t n_items = 0, at = block * kItemGroup;
      std::uint32_t turn = 0;
      for (std::size_t n = 0; n < blocks[block].size();) {
        const int row = blocks[block][n].row;
        const std::size_t end = part_end(blocks[block], n);
        const auto part = std::span(blocks[block]).subspan(n, end - n);
        for (WorkItem& item : part_of(part, in_second_half(line, block))) {
          item.partial = next_partial[row];
          item.first_partial = first_partial[row];
          item.n_partials = n_parts[row];
          if (n_items > 0) {
            const std::size_t last = at++;
            if (n_items % kItemGroup == 0) {
              at = plan.items.size();
              plan.items.resize(at + kItemGroup);
            }
            plan.items[last].next = static_cast<std::int32_t>(at);
          }
          item.bits |= turn << kItemTurnShift;
          turn = (turn + item.n_pages * kTilesPerPage) % decode_warps(input_.head_dim);
          plan.items[at] = item;
          ++n_items;
        }
        ++next_partial[row];
        n = end;
      }
    }
    return plan;
  }

  const PlanInput& input_;
  const bool apart_;
  std::vector<std::int64_t> bytes_;  // [pages + 1]: of the pages before
  std::int64_t total_ = 0;
  int n_blocks_ = 1;
};

}  // namespace

DecodePlan plan_decode(const PlanInput& input) {
  ZC_CHECK(input.row_begin.size() >= 2 && input.set_base.size() + 1 == input.row_begin.size());
  ZC_CHECK(input.n_kv_heads > 0);
  ZC_CHECK(input.resident_blocks > 0 && input.min_block_bytes > 0);
  // A tail behind a block's pages costs their reader about 4 us (32k tokens of one sequence: 17 us
  // without, 21.7 with one); by itself it is read meanwhile. Many rows leave no blocks for that.
  constexpr int kBlocksPerRow = 8;
  const auto n_rows = static_cast<int>(input.row_begin.size()) - 1;
  if (input.with_tail && n_rows * kBlocksPerRow <= input.resident_blocks) {
    if (auto plan = Planner(input, true).plan()) {
      return std::move(*plan);
    }
  }
  return *Planner(input, false).plan();
}

}  // namespace zipcache::cuda
