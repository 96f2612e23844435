// Sealing: saliency and ranks of a window, packing, and what stays in the tail.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/step_status.h"

namespace zipcache::cuda {

// Adds the probes' to that of the stream; of each layer. False: there were no queries yet.
Expected<bool> DeviceCache::add_query_power(const LayerBatch& layers, const StreamStep& s,
                                            std::span<const ProbeParams> probes, Stream stream) {
  if (!table_.has_wide_channels() || (probes[0].n_probes == 0 && !s.adds_query_power)) {
    return false;
  }
  const TableShape& shape = table_.shape();
  std::array<QueryPowerParams, kMaxBatch> batch;
  for (std::uint32_t lane = 0; lane < layers.n; ++lane) {
    QueryPowerParams& p = batch[lane];
    p.n_queries = probes[lane].n_probes;
    p.n_kv_heads = static_cast<int>(shape.n_kv_heads);
    p.n_heads = static_cast<int>(in_.n_heads);
    p.head_dim = static_cast<int>(shape.head_dim);
    p.q = probes[lane].q;
    p.add = s.adds_query_power;
    p.power = power_of_queries(layers.first + lane, s.stream);
  }
  if (Status ok = query_power(layers.of(batch), stream); !ok) {
    return ok.error();
  }
  return true;
}

// All of a block's ranges whole, and factors and ranks as they are: order_ has the tokens' order.
PackParams DeviceCache::pack_params(std::uint32_t index, std::size_t lane, std::uint32_t of_stream,
                                    const PagedBlock& block, const RowsAt& rows,
                                    const PageEntry* pages) const {
  const TableShape& shape = table_.shape();
  PackParams p;
  p.n_tokens = static_cast<int>(block.n_tokens);
  p.n_kv_heads = static_cast<int>(shape.n_kv_heads);
  p.head_dim = static_cast<int>(shape.head_dim);
  p.k = rows.k;
  p.v = rows.v;
  p.token_stride = rows.token_stride;
  p.order = of_lane<std::int32_t>(order_, lane);
  // All classes of the policy, because the pages name them by their index there.
  p.n_classes = kPolicyClasses;
  std::ranges::copy(table_.classes(), p.classes);
  for (int c = 0; c < kPolicyClasses; ++c) {
    p.key_set[c] = -1;  // absent
    p.key_clip[c] = p.value_clip[c] = 1;
  }
  for (int c = 0; c < block.classes.n_classes; ++c) {
    const BlockClass& cls = block.classes.classes[c];
    p.class_tokens[cls.cls] = static_cast<int>(cls.n_tokens);
    p.key_set[cls.cls] = cls.key_set;
  }
  p.n_key_sets = block.classes.n_key_sets;
  p.keep_factors = true;
  p.pool = const_cast<std::uint8_t*>(pool(index));
  p.pages = pages;
  p.key_sets = key_sets_.layer<HalfBits>(index) + std::size_t{block.first_set} * 2 * shape.head_dim;
  p.key_orders =
      key_orders_.layer<std::uint8_t>(index) + std::size_t{block.first_set} * shape.head_dim;
  p.value_factors = value_factors_.layer<float>(index) +
                    std::size_t{of_stream} * shape.n_kv_heads * shape.head_dim;
  p.workspace = of_lane<std::uint32_t>(workspace_, lane);
  return p;
}

// Seals what is due of a window and puts the rest into the tail. `queries` of each layer.
Status DeviceCache::keep(const LayerBatch& layers, std::size_t n, float scale,
                         std::span<const ProbeParams> queries, Stream stream) {
  const StreamStep& s = step_.streams[n];
  if (!s.seals.empty()) {
    ZC_TRY(find_saliency(layers, n, scale, queries, stream));
  }
  const Expected<bool> has_power = add_query_power(layers, s, queries, stream);
  if (!has_power) {
    return has_power.error();
  }
  for (std::size_t i = 0; i < s.seals.size(); ++i) {
    ZC_TRY(seal(layers, n, i, *has_power, stream));
  }
  std::array<MoveParams, kMaxBatch> batch;
  for (std::uint32_t lane = 0; lane < layers.n; ++lane) {
    batch[lane] = {.n_tokens = static_cast<int>(s.keep_from.size()),
                   .n_kv_heads = static_cast<int>(table_.shape().n_kv_heads),
                   .head_dim = static_cast<int>(table_.shape().head_dim),
                   .source = window(lane, layers.window),
                   .target = tail(layers.first + lane, s.stream),
                   .from = sent<std::int32_t>(at_[n].keep_from),
                   .to = sent<std::int32_t>(at_[n].keep_to)};
  }
  return move_rows(layers.of(batch), stream);
}

Status DeviceCache::find_saliency(const LayerBatch& layers, std::size_t n, float scale,
                                  std::span<const ProbeParams> queries, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t n_window = step_.streams[n].window_cells.size();
  const bool ranks = table_.policy().ranks() && queries[0].n_probes > 0;
  std::array<ProbeParams, kMaxBatch> batch;
  for (std::uint32_t lane = 0; lane < layers.n; ++lane) {
    float* const saliency = of_lane<float>(saliency_, lane);
    if (!ranks) {  // all alike
      ZC_TRY(to_status(
          cudaMemsetAsync(saliency, 0, shape.n_kv_heads * n_window * sizeof(float), stream),
          "ranks"));
      continue;
    }
    const RowsAt rows = window(lane, layers.window);
    ProbeParams& probes = batch[lane] = queries[lane];
    probes.n_tokens = static_cast<int>(n_window);
    probes.n_kv_heads = static_cast<int>(shape.n_kv_heads);
    probes.n_heads = static_cast<int>(in_.n_heads);
    probes.head_dim = static_cast<int>(shape.head_dim);
    probes.scale = scale;
    probes.k = rows.k;
    probes.token_stride = rows.token_stride;
    probes.positions = sent<std::int32_t>(at_[n].probe_positions);
    probes.saliency = saliency;
  }
  return ranks ? probe_saliency(layers.of(batch), stream) : ok_status();
}

// The i-th block that the n-th stream of the step seals.
Status DeviceCache::seal(const LayerBatch& layers, std::size_t n, std::size_t i, bool has_power,
                         Stream stream) {
  const TableShape& shape = table_.shape();
  const StreamStep& s = step_.streams[n];
  const StreamStep::Seal& seal = s.seals[i];
  const PagedBlock& block = *seal.block;
  std::array<RankParams, kMaxBatch> ranks;
  std::array<PackParams, kMaxBatch> packs;
  for (std::uint32_t lane = 0; lane < layers.n; ++lane) {
    const std::uint32_t index = layers.first + lane;
    ranks[lane] = {.n_tokens = static_cast<int>(block.n_tokens),
                   .n_kv_heads = static_cast<int>(shape.n_kv_heads),
                   .saliency = of_lane<float>(saliency_, lane) + seal.window_begin,
                   .head_stride = static_cast<std::int64_t>(s.window_cells.size()),
                   .order = of_lane<std::int32_t>(order_, lane),
                   .kept = ranks_.layer<std::uint16_t>(index) + block.first_rank,
                   .kept_stride = block.rank_stride()};
    const RowsAt rows = window(lane, layers.window);
    PackParams& p = packs[lane] =
        pack_params(index, lane, s.stream, block, rows, sent<PageEntry>(at_[n].seal_pages[i]));
    p.k += seal.window_begin * rows.token_stride;
    p.v += seal.window_begin * rows.token_stride;
    for (int c = 0; c < block.classes.n_classes; ++c) {
      const BlockClass& cls = block.classes.classes[c];
      p.key_clip[cls.cls] = cls.key_clip;
      p.value_clip[cls.cls] = cls.value_clip;
    }
    p.wide_clip = table_.policy().key.rules.wide_clip;
    p.keep_length = table_.policy().value.rules.keep_length;
    p.query_power = has_power ? power_of_queries(index, s.stream) : nullptr;
    p.keep_factors = !seal.is_first;
  }
  ZC_TRY(rank_tokens(layers.of(ranks), stream));
  return pack(layers.of(packs), stream);
}

}  // namespace zipcache::cuda
