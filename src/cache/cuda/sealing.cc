// Sealing: saliency and ranks of a window, packing, and what stays in the tail.
#include <cuda_runtime.h>

#include <algorithm>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/step_status.h"

namespace zipcache::cuda {

Expected<const float*> DeviceCache::add_query_power(std::uint32_t index, const StreamStep& s,
                                                    const ProbeParams& probes, Stream stream) {
  if (!table_.has_wide_channels() || (probes.n_probes == 0 && !s.adds_query_power)) {
    return nullptr;
  }
  const TableShape& shape = table_.shape();
  QueryPowerParams p;
  p.n_queries = probes.n_probes;
  p.n_kv_heads = static_cast<int>(shape.n_kv_heads);
  p.n_heads = static_cast<int>(in_.n_heads);
  p.head_dim = static_cast<int>(shape.head_dim);
  p.q = probes.q;
  p.add = s.adds_query_power;
  p.power =
      query_power_.layer<float>(index) + std::size_t{s.stream} * shape.n_kv_heads * shape.head_dim;
  if (Status ok = query_power(p, stream); !ok) {
    return ok.error();
  }
  return p.power;
}

// All of a block's ranges whole, and factors and ranks as they are: order_ has the tokens' order.
PackParams DeviceCache::pack_params(std::uint32_t index, std::uint32_t of_stream,
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
  p.order = of_lane<std::int32_t>(order_);
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
  p.workspace = of_lane<std::uint32_t>(workspace_);
  return p;
}

// Seals what is due of a window and puts the rest into the tail.
Status DeviceCache::keep(std::uint32_t index, std::size_t n, float scale,
                         const ProbeParams& queries, Stream stream) {
  const TableShape& shape = table_.shape();
  const StreamStep& s = step_.streams[n];
  const Uploaded& at = at_[n];
  const RowsAt rows = window(n);
  const std::size_t n_window = s.window_cells.size();
  if (!s.seals.empty() && table_.policy().ranks() && queries.n_probes > 0) {
    ProbeParams probes = queries;
    probes.n_tokens = static_cast<int>(n_window);
    probes.n_kv_heads = static_cast<int>(shape.n_kv_heads);
    probes.n_heads = static_cast<int>(in_.n_heads);
    probes.head_dim = static_cast<int>(shape.head_dim);
    probes.scale = scale;
    probes.k = rows.k;
    probes.token_stride = rows.token_stride;
    probes.positions = sent<std::int32_t>(at.probe_positions);
    probes.saliency = of_lane<float>(saliency_);
    ZC_TRY(probe_saliency(probes, stream));
  } else if (!s.seals.empty()) {  // all alike
    ZC_TRY(to_status(cudaMemsetAsync(of_lane<float>(saliency_), 0,
                                     shape.n_kv_heads * n_window * sizeof(float), stream),
                     "ranks"));
  }
  const Expected<const float*> power = add_query_power(index, s, queries, stream);
  if (!power) {
    return power.error();
  }
  for (std::size_t i = 0; i < s.seals.size(); ++i) {
    const StreamStep::Seal& seal = s.seals[i];
    const PagedBlock& block = *seal.block;
    ZC_TRY(rank_tokens({.n_tokens = static_cast<int>(block.n_tokens),
                        .n_kv_heads = static_cast<int>(shape.n_kv_heads),
                        .saliency = of_lane<float>(saliency_) + seal.window_begin,
                        .head_stride = static_cast<std::int64_t>(n_window),
                        .order = of_lane<std::int32_t>(order_),
                        .kept = ranks_.layer<std::uint16_t>(index) + block.first_rank,
                        .kept_stride = block.rank_stride()},
                       stream));
    PackParams p = pack_params(index, s.stream, block, rows, sent<PageEntry>(at.seal_pages[i]));
    p.k += seal.window_begin * rows.token_stride;
    p.v += seal.window_begin * rows.token_stride;
    for (int c = 0; c < block.classes.n_classes; ++c) {
      const BlockClass& cls = block.classes.classes[c];
      p.key_clip[cls.cls] = cls.key_clip;
      p.value_clip[cls.cls] = cls.value_clip;
    }
    p.wide_clip = table_.policy().key.rules.wide_clip;
    p.keep_length = table_.policy().value.rules.keep_length;
    p.query_power = *power;
    p.keep_factors = !seal.is_first;
    ZC_TRY(pack(p, stream));
  }
  return move_rows({.n_tokens = static_cast<int>(s.keep_from.size()),
                    .n_kv_heads = static_cast<int>(shape.n_kv_heads),
                    .head_dim = static_cast<int>(shape.head_dim),
                    .source = rows,
                    .target = tail(index, s.stream),
                    .from = sent<std::int32_t>(at.keep_from),
                    .to = sent<std::int32_t>(at.keep_to)},
                   stream);
}

}  // namespace zipcache::cuda
