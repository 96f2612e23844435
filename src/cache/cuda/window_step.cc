// The general way of a step: unsealed tokens are gathered into a window, prefill() attends to it
// and to the pages under the mask, and what is due is sealed.
#include <algorithm>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/step_status.h"

namespace zipcache::cuda {

Status DeviceCache::window_layer(std::uint32_t index, const LayerTensors& layer, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t n_per_stream = step_.n_per_stream;
  for (std::size_t n = 0; n < step_.streams.size(); ++n) {
    ZC_TRY(gather({index, 1, n}, n, stream));
    ZC_TRY(take_restored(index, n, stream));
  }
  IngestParams put;
  put.n_sequences = static_cast<int>(step_.streams.size());
  put.n_per_sequence = static_cast<int>(n_per_stream);
  put.n_kv_heads = static_cast<int>(shape.n_kv_heads);
  put.head_dim = static_cast<int>(shape.head_dim);
  put.k = layer.k;
  put.v = layer.v;
  put.k_stride = layer.k_stride;
  put.v_stride = layer.v_stride;
  put.to = window(0, 0);
  put.place = sent<std::int32_t>(place_);
  ZC_TRY(ingest(put, stream));

  for (std::size_t n = 0; n < step_.streams.size(); ++n) {
    const StreamStep& s = step_.streams[n];
    const Uploaded& at = at_[n];
    PrefillParams attend;
    attend.n_queries = static_cast<int>(n_per_stream);
    attend.n_kv_heads = put.n_kv_heads;
    attend.n_heads = static_cast<int>(in_.n_heads);
    attend.head_dim = put.head_dim;
    attend.scale = layer.scale;
    attend.softcap = layer.softcap;
    attend.slopes = has_slopes_ ? sent<float>(slopes_) : nullptr;
    attend.sinks = layer.sinks;
    attend.q = layer.q + static_cast<std::int64_t>(n) * layer.q_stream_stride;
    attend.q_query_stride = layer.q_query_stride;
    attend.q_head_stride = layer.q_head_stride;
    attend.out = layer.out + n * n_per_stream * in_.n_heads * shape.head_dim;
    attend.lse = lse_.as<float>() + n * n_per_stream * in_.n_heads;
    attend.mask = in_.mask == nullptr
                      ? nullptr
                      : in_.mask + static_cast<std::int64_t>(n) * in_.mask_plane_stride;
    attend.mask_stride = in_.mask_row_stride;
    const RowsAt rows = window(0, n);
    attend.n_dense = static_cast<int>(s.window_cells.size());
    attend.dense_k = rows.k;
    attend.dense_v = rows.v;
    attend.dense_token_stride = rows.token_stride;
    attend.dense_head_stride = rows.head_stride;
    attend.dense_cells = sent<std::int32_t>(at.window_cells);
    std::uint32_t n_sealed = 0;
    if (at.n_pages > 0) {
      ZC_TRY(list_page_cells({.n_pages = static_cast<int>(at.n_pages),
                              .pages = sent<PageSource>(at.sources),
                              .kept = ranks_.layer<std::uint16_t>(index),
                              .block_cells = block_cells_.as<std::int32_t>(),
                              .page_cells = page_cells_.as<std::int32_t>()},
                             stream));
      std::ranges::copy(table_.classes(), attend.classes);
      attend.pool = pool(index);
      attend.pages = sent<PageEntry>(at.pages);
      attend.page_cells = page_cells_.as<std::int32_t>();
      attend.row_begin = sent<std::int32_t>(at.row_begin);
      attend.set_base = sent<std::int32_t>(zeros_);
      attend.key_sets = key_sets_.layer<HalfBits>(index);
      attend.key_orders = key_orders_.layer<std::uint8_t>(index);
      attend.value_factors = value_factors_.layer<float>(index) +
                             std::size_t{s.stream} * shape.n_kv_heads * shape.head_dim;
      for (const auto& block : s.visible) {
        n_sealed += block->n_tokens;
      }
    }
    attend.n_splits =
        prefill_splits(attend, attend.n_dense + static_cast<int>(n_sealed), prefill_blocks_);
    if (attend.n_splits > 1) {
      ZC_TRY(prefill_partials_.ensure(prefill_partial_floats(attend) * sizeof(float), stream));
      ZC_TRY(prefill_tickets_.ensure(prefill_tickets(attend) * sizeof(std::uint32_t), stream));
      attend.partials = prefill_partials_.as<float>();
      attend.tickets = prefill_tickets_.as<std::uint32_t>();
    }
    ZC_TRY(prefill(attend, stream));

    ProbeParams probes;
    if (table_.has_wide_channels() || (!s.seals.empty() && table_.policy().ranks())) {
      ZC_TRY(gather_probes({.n_probes = static_cast<int>(at.n_probes),
                            .n_heads = attend.n_heads,
                            .head_dim = put.head_dim,
                            .rows = sent<std::int32_t>(at.probe_rows),
                            .q = attend.q,
                            .q_query_stride = layer.q_query_stride,
                            .q_head_stride = layer.q_head_stride,
                            .lse = attend.lse,
                            .probe_q = probe_q_.as<HalfBits>(),
                            .probe_lse = probe_lse_.as<float>()},
                           stream));
      probes.n_probes = static_cast<int>(at.n_probes);
      probes.q = probe_q_.as<HalfBits>();
      probes.lse = probe_lse_.as<float>();
    }
    ZC_TRY(keep({index, 1, n}, n, layer.scale, {&probes, 1}, stream));
  }
  return ok_status();
}

}  // namespace zipcache::cuda
