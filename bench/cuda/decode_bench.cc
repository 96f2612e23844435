// Decode attention, checked against the formula in double (two rows) before it is timed.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/half.h"
#include "cuda_bench.h"
#include "device_memory.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/host_page.h"
#include "kernels/cuda/plan.h"
#include "packed_batch.h"
#include "random_contents.h"

namespace zipcache::cuda {
namespace {

// The fp16 tails of all rows, one copy or all.
struct Tails {
  DeviceBuffer<HalfBits> k, v;
  DeviceBuffer<std::int32_t> tokens;
  std::size_t size;  // of one copy

  Tails(const Shape& shape, int n_copies)
      : k(copy_size(shape) * n_copies),
        v(copy_size(shape) * n_copies),
        tokens(std::vector<std::int32_t>(shape.batch, shape.tail)),
        size(copy_size(shape)) {
    fill_normal(k.data(), size * n_copies, 4);
    fill_normal(v.data(), size * n_copies, 5);
  }
  static std::size_t copy_size(const Shape& shape) {
    return shape.tail == 0
               ? 0
               : std::size_t(shape.batch) * shape.n_kv_heads * kTailTokens * shape.head_dim;
  }
};

// Attention of one query head over a row's pages, in double, straight from the page bytes.
double check_row(const Shape& shape, const std::vector<std::byte>& pool,
                 const std::vector<PageEntry>& pages, int begin, int end,
                 const std::vector<HalfBits>& sets, const std::vector<std::uint8_t>& orders,
                 int set_base, const float* factors, const HalfBits* q, const HalfBits* tail_k,
                 const HalfBits* tail_v, const float* got) {
  const int d = shape.head_dim;
  const double scale = 1 / std::sqrt(double(d));
  std::vector<double> scores, sum(d);
  std::vector<double> values;
  for (int at = begin; at < end; ++at) {
    const PageEntry e = pages[at];
    const PageClass cls = shape.classes[e.cls];
    const HostPage page({const_cast<std::byte*>(&pool[std::size_t{e.unit} * kTileAlignment]),
                         std::size_t(page_bytes(d, cls))},
                        d, cls);
    const std::size_t set_at = std::size_t(set_base + e.set) * d;
    const HalfBits* set = &sets[2 * set_at];
    for (int token = 0; token < e.tokens; ++token) {
      double dot = 0;
      for (int c = 0; c < d; ++c) {
        const int channel = cls.wide_chunks > 0 ? orders[set_at + c] : c;  // of the c-th stored
        dot +=
            double{half_to_float(q[channel])} *
            (double{half_to_float(set[c])} * page.key_code(token, c) + half_to_float(set[d + c]));
        values.push_back(double{factors[c]} * half_to_float(page.scale(token)) *
                         (page.value_code(token, c) - half_to_float(page.zero(token))));
      }
      scores.push_back(dot * scale);
    }
  }
  for (int token = 0; token < shape.tail; ++token) {
    double dot = 0;
    for (int c = 0; c < d; ++c) {
      dot += double{half_to_float(q[c])} * half_to_float(tail_k[token * d + c]);
      values.push_back(half_to_float(tail_v[token * d + c]));
    }
    scores.push_back(dot * scale);
  }
  const double max = *std::ranges::max_element(scores);
  double total = 0;
  for (std::size_t token = 0; token < scores.size(); ++token) {
    const double p = std::exp(scores[token] - max);
    total += p;
    for (int c = 0; c < d; ++c) {
      sum[c] += p * values[token * d + c];
    }
  }
  double error = 0, size = 0;
  for (int c = 0; c < d; ++c) {
    error += std::pow(got[c] - sum[c] / total, 2);
    size += std::pow(sum[c] / total, 2);
  }
  return std::sqrt(error / size);
}

// The relative error of the last head of the first and the last row, of the first copy.
double worst_error(const Shape& shape, const PackedBatch& batch, const Tails& tails,
                   const std::vector<HalfBits>& q, const std::vector<float>& out) {
  const std::vector<std::uint8_t> bytes = batch.pools.to_host(batch.layout.pool_bytes);
  std::vector<std::byte> pool(bytes.size());
  std::memcpy(pool.data(), bytes.data(), bytes.size());
  const std::vector<HalfBits> k = tails.k.to_host(tails.size), v = tails.v.to_host(tails.size);
  const int d = shape.head_dim, group = shape.n_heads / shape.n_kv_heads;
  double worst = 0;
  for (const int row : {0, shape.batch * shape.n_kv_heads - 1}) {
    const std::size_t head = std::size_t(row / shape.n_kv_heads) * shape.n_heads +
                             std::size_t(row % shape.n_kv_heads) * group + group - 1;
    const std::size_t tail = shape.tail == 0 ? 0 : std::size_t(row) * kTailTokens * d;
    const PageLayout& layout = batch.layout;
    worst =
        std::max(worst, check_row(shape, pool, layout.pages, layout.row_begin[row],
                                  layout.row_begin[row + 1], batch.host_sets, batch.host_orders,
                                  layout.set_base[row], &batch.host_factors[std::size_t(row) * d],
                                  &q[head * d], k.data() + tail, v.data() + tail, &out[head * d]));
  }
  return worst;
}

}  // namespace

void bench_decode(const Report& report, const Shape& shape, int n_samples) {
  const int n_rows = shape.batch * shape.n_kv_heads, d = shape.head_dim;
  const int group = shape.n_heads / shape.n_kv_heads;
  const PackedBatch batch(shape);
  const Tails tails(shape, batch.n_copies);
  const std::size_t q_size = std::size_t(shape.batch) * shape.n_heads * d;
  const DeviceBuffer<HalfBits> q_halves(q_size);
  fill_normal(q_halves.data(), q_size, 3);
  const std::vector<HalfBits> host_q = q_halves.to_host();
  std::vector<float> q_floats(q_size);
  std::ranges::transform(host_q, q_floats.begin(), half_to_float);
  const DeviceBuffer<float> q(q_floats);
  const DeviceBuffer<float> out(q_size);

  const DecodeSetup setup = require_ok(prepare_decode(d, group, shape.classes));
  PlanInput input;
  input.head_dim = d;
  input.classes = shape.classes;
  input.pages = batch.layout.pages;
  input.row_begin = batch.layout.row_begin;
  input.set_base = batch.layout.set_base;
  input.group = group;
  input.n_kv_heads = shape.n_kv_heads;
  input.with_tail = shape.tail > 0;
  input.tail_tokens = shape.tail;
  input.resident_blocks = setup.resident_blocks;
  input.resident_clusters = setup.resident_clusters;
  if (shape.block_tokens > 0) {
    input.min_block_bytes = kShortRunsBlockBytes;
  }
  const DecodePlan plan = plan_decode(input);
  const DeviceBuffer<WorkItem> items(plan.items);
  const DeviceBuffer<float> partials(std::size_t(plan.n_partials) * partial_floats(d, group));
  const DeviceBuffer<std::uint32_t> tickets(std::vector<std::uint32_t>(n_rows, 0));

  DecodeParams p;
  p.n_sequences = shape.batch;
  p.n_kv_heads = shape.n_kv_heads;
  p.n_heads = shape.n_heads;
  p.head_dim = d;
  p.scale = 1 / std::sqrt(float(d));
  p.q = q.data();
  p.out = out.data();
  p.pages = batch.pages.data();
  p.key_sets = batch.key_sets.data();
  p.key_orders = batch.key_orders.data();
  p.value_factors = batch.value_factors.data();
  p.items = items.data();
  p.n_blocks = plan.n_blocks;
  p.cluster_blocks = plan.cluster_blocks;
  p.partials = partials.data();
  p.tickets = tickets.data();
  const auto launch = [&](int copy, cudaStream_t stream) {
    p.pool = batch.pool(copy);
    if (shape.tail > 0) {
      p.tail_k = tails.k.data() + copy * tails.size;
      p.tail_v = tails.v.data() + copy * tails.size;
      p.tail_tokens = tails.tokens.data();
    }
    require_ok(decode(p, setup, stream));
  };

  launch(0, nullptr);
  const double error = worst_error(shape, batch, tails, host_q, out.to_host());
  if (!(error < 5e-3)) {
    std::fprintf(stderr, "%s: wrong, relative error %g\n", shape.name.c_str(), error);
    std::exit(1);
  }
  const double bytes = batch.bytes() + q_size * 8.0 + double(n_rows) * shape.tail * d * 4;
  char extra[160];
  std::snprintf(extra, sizeof(extra), "err %.1e blocks %d parts %d slots %d", error, p.n_blocks,
                plan.n_partials, setup.shared.n_slots);
  report.line("decode", shape.name, bytes, time_graph(batch.n_copies, n_samples, launch), extra);
  // Launches that may start under the end of the one before.
  p.start_early = true;
  report.line("decode early", shape.name, bytes, time_graph(batch.n_copies, n_samples, launch),
              extra);
  // What a launch behind another kernel adds to it.
  const CacheFlush flush;
  const Timing alone = time_graph(batch.n_copies, n_samples,
                                  [&](int, cudaStream_t stream) { flush.launch(stream); });
  const Timing both = time_graph(batch.n_copies, n_samples, [&](int copy, cudaStream_t stream) {
    flush.launch(stream);
    launch(copy, stream);
  });
  report.line("decode cold", shape.name, bytes, both - alone.median, extra);
}

}  // namespace zipcache::cuda
