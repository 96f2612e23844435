// What a prompt costs: attention of a chunk over packed pages, packing, the saliency probe.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/half.h"
#include "cuda_bench.h"
#include "device_memory.h"
#include "kernels/cuda/cuda_kernels.h"
#include "packed_batch.h"
#include "random_contents.h"

namespace zipcache::cuda {
namespace {

constexpr int kPromptCopies = 3;

// fp16 rows [tokens, n_kv_heads, head_dim], in copies.
DeviceBuffer<HalfBits> random_rows(const Shape& shape, int n_copies, std::uint64_t seed) {
  const std::size_t size = std::size_t(shape.tokens) * shape.n_kv_heads * shape.head_dim;
  DeviceBuffer<HalfBits> rows(size * n_copies);
  fill_normal(rows.data(), size * n_copies, seed);
  return rows;
}

std::string terms_per_second(double pairs, int head_dim, int products, const Timing& t) {
  char text[80];
  std::snprintf(text, sizeof(text), "%.0f TFLOP/s",
                pairs * head_dim * 2 * products / t.median * 1e-12);
  return text;
}

// A random split of the tokens, in order inside each class, as ranking leaves it.
std::vector<std::int32_t> random_order(const Shape& shape, const PageLayout& layout) {
  std::vector<std::int32_t> order;
  for (int head = 0; head < shape.n_kv_heads; ++head) {
    std::vector<std::pair<std::uint32_t, std::int32_t>> keys(shape.tokens);
    for (int token = 0; token < shape.tokens; ++token) {
      keys[token] = {mix(std::uint64_t(head) * shape.tokens + token + 77), token};
    }
    std::ranges::sort(keys);
    const std::size_t begin = order.size();
    for (const auto& key : keys) {
      order.push_back(key.second);
    }
    auto at = order.begin() + std::ptrdiff_t(begin);
    for (const std::int32_t n : layout.class_tokens) {
      std::sort(at, at + n);
      at += n;
    }
  }
  return order;
}

}  // namespace

void bench_prefill(const Report& report, const Shape& shape, int n_queries, int n_samples) {
  const PackedBatch batch(shape);
  const int d = shape.head_dim, n_cells = shape.tokens + n_queries;
  Shape chunk = shape;
  chunk.tokens = n_queries;
  const DeviceBuffer<HalfBits> k = random_rows(chunk, 1, 8), v = random_rows(chunk, 1, 9);
  const std::size_t q_size = std::size_t(n_queries) * shape.n_heads * d;
  const DeviceBuffer<float> q(q_size), out(q_size);
  fill_normal(q.data(), q_size, 10);
  // Sealed slots are the cells in order; the chunk follows and sees itself causally.
  std::vector<std::int32_t> page_cells, dense_cells(n_queries);
  for (int row = 0; row < shape.n_kv_heads; ++row) {
    std::int32_t cell = 0;
    for (int page = batch.layout.row_begin[row]; page < batch.layout.row_begin[row + 1]; ++page) {
      for (int slot = 0; slot < kPageTokens; ++slot) {
        page_cells.push_back(slot < batch.layout.pages[page].tokens ? cell++ : -1);
      }
    }
  }
  std::iota(dense_cells.begin(), dense_cells.end(), shape.tokens);
  std::vector<HalfBits> host_mask(std::size_t(n_queries) * n_cells, 0);
  for (int query = 0; query < n_queries; ++query) {
    const auto row = host_mask.begin() + std::ptrdiff_t(query) * n_cells;
    std::fill(row + shape.tokens + query + 1, row + n_cells, float_to_half(-INFINITY));
  }
  const DeviceBuffer<std::int32_t> cells(page_cells), chunk_cells(dense_cells),
      row_begin(batch.layout.row_begin), set_base(batch.layout.set_base);
  const DeviceBuffer<HalfBits> mask(host_mask);

  PrefillParams p;
  p.n_queries = n_queries;
  p.n_kv_heads = shape.n_kv_heads;
  p.n_heads = shape.n_heads;
  p.head_dim = d;
  p.scale = 1 / std::sqrt(float(d));
  p.q = q.data();
  p.q_query_stride = std::int64_t{shape.n_heads} * d;
  p.q_head_stride = d;
  p.out = out.data();
  p.mask = mask.data();
  p.mask_stride = n_cells;
  std::ranges::copy(batch.classes, p.classes);
  p.pages = batch.pages.data();
  p.page_cells = cells.data();
  p.row_begin = row_begin.data();
  p.set_base = set_base.data();
  p.key_sets = batch.key_sets.data();
  p.key_orders = batch.key_orders.data();
  p.value_factors = batch.value_factors.data();
  p.n_dense = n_queries;
  p.dense_k = k.data();
  p.dense_v = v.data();
  p.dense_token_stride = std::int64_t{shape.n_kv_heads} * d;
  p.dense_head_stride = d;
  p.dense_cells = chunk_cells.data();
  p.n_splits = prefill_splits(p, n_cells, require_ok(prefill_resident_blocks(d)));
  const DeviceBuffer<float> partials(prefill_partial_floats(p));
  const DeviceBuffer<std::uint32_t> tickets(std::vector<std::uint32_t>(prefill_tickets(p), 0));
  p.partials = partials.data();
  p.tickets = tickets.data();
  const Timing t = time_graph(batch.n_copies, n_samples, [&](int copy, cudaStream_t stream) {
    p.pool = batch.pool(copy);
    require_ok(prefill(p, stream));
  });
  const double pairs = double(n_queries) * (shape.tokens + 0.5 * (n_queries + 1)) * shape.n_heads;
  report.line("prefill", shape.name + ", " + std::to_string(n_queries) + " queries",
              batch.bytes() + page_cells.size() * 4.0 + double(n_queries) * n_cells * 2, t,
              terms_per_second(pairs, d, 2, t) + ", " + std::to_string(p.n_splits) + " parts");
}

void bench_fp16_rows(const Report& report, const std::string& name, int n_tokens, int n_samples) {
  Shape shape;
  shape.tokens = n_tokens;
  const std::int64_t token = std::int64_t{shape.n_kv_heads} * shape.head_dim;
  const std::int64_t size = token * n_tokens;
  // As many copies as keep the L2 cache cold.
  const int n_copies = static_cast<int>(std::max<std::int64_t>((1 << 28) / size, 3));
  const DeviceBuffer<HalfBits> k = random_rows(shape, n_copies, 8),
                               v = random_rows(shape, n_copies, 9);
  const std::size_t q_size = std::size_t(shape.n_heads) * shape.head_dim;
  const DeviceBuffer<float> q(q_size), out(q_size);
  fill_normal(q.data(), q_size, 10);
  PrefillParams p;
  p.n_queries = 1;
  p.n_kv_heads = shape.n_kv_heads;
  p.n_heads = shape.n_heads;
  p.head_dim = shape.head_dim;
  p.scale = 1 / std::sqrt(float(shape.head_dim));
  p.q = q.data();
  p.q_query_stride = std::int64_t{shape.n_heads} * shape.head_dim;
  p.q_head_stride = shape.head_dim;
  p.out = out.data();
  p.n_dense = n_tokens;
  p.dense_token_stride = token;
  p.dense_head_stride = shape.head_dim;
  p.n_splits = prefill_splits(p, n_tokens, require_ok(prefill_resident_blocks(shape.head_dim)));
  const DeviceBuffer<float> partials(prefill_partial_floats(p));
  const DeviceBuffer<std::uint32_t> tickets(std::vector<std::uint32_t>(prefill_tickets(p), 0));
  p.partials = partials.data();
  p.tickets = tickets.data();
  const Timing t = time_graph(n_copies, n_samples, [&](int copy, cudaStream_t stream) {
    p.dense_k = k.data() + copy * size;
    p.dense_v = v.data() + copy * size;
    require_ok(prefill(p, stream));
  });
  report.line("decode fp16 ours", name, double(size) * 4, t);
}

void bench_pack(const Report& report, const Shape& shape, int n_samples) {
  const PageLayout layout(shape);
  const DeviceBuffer<HalfBits> k = random_rows(shape, kPromptCopies, 8),
                               v = random_rows(shape, kPromptCopies, 9);
  const std::size_t size = std::size_t(shape.tokens) * shape.n_kv_heads * shape.head_dim;
  PackParams p;
  p.n_tokens = shape.tokens;
  p.n_kv_heads = shape.n_kv_heads;
  p.head_dim = shape.head_dim;
  p.token_stride = std::int64_t{shape.n_kv_heads} * shape.head_dim;
  p.n_classes = static_cast<std::int32_t>(shape.classes.size());
  p.n_key_sets = layout.n_sets;
  for (int cls = 0; cls < p.n_classes; ++cls) {
    p.classes[cls] = shape.classes[cls];
    p.class_tokens[cls] = layout.class_tokens[cls];
    p.key_set[cls] = layout.class_set[cls];
    p.key_clip[cls] = p.value_clip[cls] = 1;
  }
  const DeviceBuffer<std::int32_t> order(random_order(shape, layout));
  const DeviceBuffer<PageEntry> pages(layout.pages);
  const DeviceBuffer<std::uint8_t> pool(layout.pool_bytes);
  const DeviceBuffer<HalfBits> key_sets(std::size_t(p.n_kv_heads) * p.n_key_sets * 2 * p.head_dim);
  const DeviceBuffer<std::uint8_t> key_orders(std::size_t(p.n_kv_heads) * p.n_key_sets *
                                              p.head_dim);
  const DeviceBuffer<float> factors(std::size_t(p.n_kv_heads) * p.head_dim);
  const DeviceBuffer<std::uint32_t> workspace(
      std::vector<std::uint32_t>(pack_workspace_words(p), 0));
  p.order = order.data();
  p.pages = pages.data();
  p.pool = pool.data();
  p.key_sets = key_sets.data();
  p.key_orders = key_orders.data();
  // As the default has it.
  p.keep_length = std::ranges::any_of(shape.classes, [](auto cls) { return cls.wide_chunks > 0; });
  p.value_factors = factors.data();
  p.workspace = workspace.data();
  const Timing t = time_graph(kPromptCopies, n_samples, [&](int copy, cudaStream_t stream) {
    p.k = k.data() + copy * size;
    p.v = v.data() + copy * size;
    require_ok(pack(p, stream));
  });
  report.line("pack", shape.name, size * 4.0 + double(layout.pool_bytes), t);
}

void bench_probe(const Report& report, const Shape& shape, int n_probes, int n_samples) {
  const DeviceBuffer<HalfBits> k = random_rows(shape, kPromptCopies, 8);
  const std::size_t size = std::size_t(shape.tokens) * shape.n_kv_heads * shape.head_dim;
  const std::size_t n_rows = std::size_t(n_probes) * shape.n_heads;
  const DeviceBuffer<HalfBits> q(n_rows * shape.head_dim);
  fill_normal(q.data(), n_rows * shape.head_dim, 10);
  std::vector<std::int32_t> host_positions(n_probes);
  double pairs = 0;
  for (int n = 0; n < n_probes; ++n) {  // half of them the newest, half spread over the rest
    host_positions[n] = n < n_probes / 2 ? int(int64_t{n} * shape.tokens * 2 / n_probes) * 63 / 64
                                         : shape.tokens - n_probes + n;
    pairs += double(host_positions[n] + 1) * shape.n_heads;
  }
  const DeviceBuffer<std::int32_t> positions(host_positions);
  const DeviceBuffer<float> lse(std::vector<float>(n_rows, 15.7f)),
      saliency(std::size_t(shape.n_kv_heads) * shape.tokens);
  ProbeParams p;
  p.n_tokens = shape.tokens;
  p.n_probes = n_probes;
  p.n_kv_heads = shape.n_kv_heads;
  p.n_heads = shape.n_heads;
  p.head_dim = shape.head_dim;
  p.scale = 1 / std::sqrt(float(shape.head_dim));
  p.token_stride = std::int64_t{shape.n_kv_heads} * shape.head_dim;
  p.q = q.data();
  p.positions = positions.data();
  p.lse = lse.data();
  p.saliency = saliency.data();
  const Timing t = time_graph(kPromptCopies, n_samples, [&](int copy, cudaStream_t stream) {
    p.k = k.data() + copy * size;
    require_ok(probe_saliency(p, stream));
  });
  report.line("probe", shape.name + ", " + std::to_string(n_probes) + " probes", size * 2.0, t,
              terms_per_second(pairs, shape.head_dim, 1, t));

  QueryPowerParams power;
  power.n_queries = n_probes;
  power.n_kv_heads = shape.n_kv_heads;
  power.n_heads = shape.n_heads;
  power.head_dim = shape.head_dim;
  power.q = q.data();
  const DeviceBuffer<float> sums(std::size_t(shape.n_kv_heads) * shape.head_dim);
  power.power = sums.data();
  report.line("query power", shape.name + ", " + std::to_string(n_probes) + " probes",
              double(n_rows) * shape.head_dim * 2,
              time_graph(kPromptCopies, n_samples, [&](int, cudaStream_t stream) {
                require_ok(query_power(power, stream));
              }));
}

}  // namespace zipcache::cuda
