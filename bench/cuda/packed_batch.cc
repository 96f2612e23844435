#include "packed_batch.h"

#include <algorithm>

#include "base/half.h"
#include "random_contents.h"

namespace zipcache::cuda {
namespace {

// Key scales and minima of every row and set: ranges of 2 to 6 with zero inside.
std::vector<HalfBits> random_sets(const Shape& shape, const PageLayout& layout) {
  std::vector<HalfBits> sets;
  const int n_rows = shape.batch * shape.n_kv_heads;
  for (int row = 0; row < n_rows; ++row) {
    for (int set = 0; set < layout.n_sets * layout.n_blocks; ++set) {
      const PageClass cls = shape.classes[std::ranges::find(layout.class_set, set % layout.n_sets) -
                                          layout.class_set.begin()];
      std::vector<HalfBits> low;
      for (int c = 0; c < shape.head_dim; ++c) {
        const float levels = static_cast<float>((1 << cls.chunk_bits(c / kChunkChannels)) - 1);
        const std::uint64_t x = sets.size() * 3 + low.size();
        const float range = 2 + 4 * unit_float(2 * x);
        sets.push_back(float_to_half(range / levels));
        low.push_back(float_to_half(-range * (0.3f + 0.4f * unit_float(2 * x + 1))));
      }
      sets.insert(sets.end(), low.begin(), low.end());
    }
  }
  return sets;
}

// Random wide channels of every set, the others behind; none if no class has wide channels.
std::vector<std::uint8_t> random_orders(const Shape& shape, const PageLayout& layout) {
  std::vector<std::uint8_t> orders;
  int n_wide = 0;
  for (const PageClass cls : shape.classes) {
    n_wide = std::max(n_wide, cls.wide_chunks * kChunkChannels);
  }
  const std::size_t n_sets =
      std::size_t(shape.batch) * shape.n_kv_heads * layout.n_sets * layout.n_blocks;
  for (std::size_t set = 0; n_wide > 0 && set < n_sets; ++set) {
    std::vector<std::pair<std::uint32_t, std::uint8_t>> channels;
    for (int c = 0; c < shape.head_dim; ++c) {
      channels.emplace_back(mix(set * shape.head_dim + c + 99), static_cast<std::uint8_t>(c));
    }
    std::ranges::sort(channels);
    std::sort(channels.begin(), channels.begin() + n_wide,
              [](const auto& a, const auto& b) { return a.second < b.second; });
    std::sort(channels.begin() + n_wide, channels.end(),
              [](const auto& a, const auto& b) { return a.second < b.second; });
    for (const auto& channel : channels) {
      orders.push_back(channel.second);
    }
  }
  return orders;
}

std::vector<float> random_factors(const Shape& shape) {
  std::vector<float> factors(std::size_t(shape.batch) * shape.n_kv_heads * shape.head_dim);
  for (std::size_t at = 0; at < factors.size(); ++at) {
    factors[at] = 0.05f + 0.1f * unit_float(at + 12345);
  }
  return factors;
}

}  // namespace

PageLayout::PageLayout(const Shape& shape) {
  for (const PageClass cls : shape.classes) {
    const auto same = std::ranges::find_if(shape.classes, [&](PageClass other) {
      return other.key_bits == cls.key_bits && other.wide_chunks == cls.wide_chunks;
    });
    const auto first = static_cast<std::size_t>(same - shape.classes.begin());
    class_set.push_back(first < class_set.size() ? class_set[first] : n_sets++);
  }
  const int block_tokens = shape.block_tokens > 0 ? shape.block_tokens : shape.tokens;
  n_blocks = shape.tokens / block_tokens;
  // Classes of blocks are counted in pages, so that none is partly empty.
  const int step = shape.block_tokens > 0 ? kPageTokens : 1;
  int left = block_tokens;
  for (std::size_t cls = 0; cls < shape.classes.size(); ++cls) {
    const bool last = cls + 1 == shape.classes.size();
    class_tokens.push_back(last ? left : int(block_tokens / step * shape.share[cls] + 0.5) * step);
    left -= class_tokens.back();
  }
  const auto n_classes = static_cast<int>(shape.classes.size());
  for (int row = 0; row < shape.batch * shape.n_kv_heads; ++row) {
    for (int at = 0; at < n_blocks * n_classes; ++at) {
      const int block = at / n_classes, nth = at % n_classes;
      const int cls = block % 2 == 0 ? nth : n_classes - 1 - nth;
      for (int first = 0; first < class_tokens[cls]; first += kPageTokens) {
        PageEntry e;
        e.unit = static_cast<std::uint32_t>(pool_bytes / kTileAlignment);
        e.set = static_cast<std::uint16_t>(block * n_sets + class_set[cls]);
        e.tokens = static_cast<std::uint8_t>(std::min(class_tokens[cls] - first, kPageTokens));
        e.cls = static_cast<std::uint8_t>(cls);
        pages.push_back(e);
        pool_bytes += page_bytes(shape.head_dim, shape.classes[cls]);
      }
    }
    row_begin.push_back(static_cast<std::int32_t>(pages.size()));
    set_base.push_back(row * n_blocks * n_sets);
  }
}

PackedBatch::PackedBatch(const Shape& shape)
    : layout(shape),
      n_copies(int(std::clamp<std::size_t>((std::size_t{1} << 30) / layout.pool_bytes, 3, 64))),
      host_sets(random_sets(shape, layout)),
      host_orders(random_orders(shape, layout)),
      host_factors(random_factors(shape)),
      pools(layout.pool_bytes * n_copies),
      pages(layout.pages),
      key_sets(host_sets),
      key_orders(host_orders),
      value_factors(host_factors) {
  std::ranges::copy(shape.classes, classes);
  fill_random(pools.data(), layout.pool_bytes * n_copies, 7);
  for (int copy = 0; copy < n_copies; ++copy) {
    fill_token_params(pools.data() + copy * layout.pool_bytes, pages.data(),
                      int(layout.pages.size()), shape.head_dim, classes);
  }
}

}  // namespace zipcache::cuda
