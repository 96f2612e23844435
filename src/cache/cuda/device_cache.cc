#include "cache/cuda/device_cache.h"

#include <array>

#include "cache/cuda/step_status.h"

namespace zipcache::cuda {

Expected<std::unique_ptr<DeviceCache>> DeviceCache::create(const TableShape& shape,
                                                           const policy::Policy& policy) {
  std::unique_ptr<DeviceCache> cache(new DeviceCache(shape, policy));
  // Room for fp16 and a fifth more: pages with 8-bit codes and parameters fit. Addresses cost
  // nothing.
  const std::size_t fp16 = std::size_t{shape.n_layers} * shape.n_streams * shape.n_cells *
                           shape.n_kv_heads * shape.head_dim * 2 * sizeof(HalfBits);
  if (Status ok = cache->pool_.reserve(fp16 + fp16 / 4 + (std::size_t{64} << 20)); !ok) {
    return ok.error();
  }
  for (LayeredArray* array :
       {&cache->key_sets_, &cache->key_orders_, &cache->query_power_, &cache->ranks_,
        &cache->value_factors_, &cache->tail_k_, &cache->tail_v_, &cache->ring_q_,
        &cache->ring_lse_, &cache->last_lse_}) {
    array->set_layers(shape.n_layers);
  }
  const auto blocks = prefill_resident_blocks(static_cast<int>(shape.head_dim));
  if (!blocks) {
    return blocks.error();
  }
  cache->prefill_blocks_ = *blocks;
  return cache;
}

const std::uint8_t* DeviceCache::pool(std::uint32_t index) const {
  return reinterpret_cast<const std::uint8_t*>(pool_.data()) +
         std::size_t{index} * table_.layer_bytes();
}

RowsAt DeviceCache::tail(std::uint32_t index, std::uint32_t stream) const {
  const TableShape& s = table_.shape();
  const std::int64_t of_head = std::int64_t{kTailTokens} * s.head_dim;
  const std::int64_t of_stream = of_head * s.n_kv_heads;
  return {tail_k_.layer<HalfBits>(index) + stream * of_stream,
          tail_v_.layer<HalfBits>(index) + stream * of_stream, of_stream, s.head_dim, of_head};
}

RowsAt DeviceCache::window(std::size_t lane, std::size_t s) const {
  const std::int64_t token = std::int64_t{table_.shape().n_kv_heads} * table_.shape().head_dim;
  const std::int64_t stream = token * static_cast<std::int64_t>(window_tokens_);
  HalfBits* const k = of_lane<HalfBits>(window_, lane);
  HalfBits* const v = k + stream * static_cast<std::int64_t>(n_windows_);
  const auto n = static_cast<std::int64_t>(s);
  return {k + n * stream, v + n * stream, stream, token, table_.shape().head_dim};
}

Status DeviceCache::run_layer(std::uint32_t index, const LayerTensors& layer, Stream stream) {
  return step_.is_decode ? decode_layer(index, layer, stream) : window_layer(index, layer, stream);
}

Status DeviceCache::gather(const LayerBatch& layers, std::size_t n, Stream stream) {
  const StreamStep& s = step_.streams[n];
  std::array<MoveParams, kMaxBatch> batch;
  for (std::uint32_t lane = 0; lane < layers.n; ++lane) {
    batch[lane] = {.n_tokens = static_cast<int>(s.gather_from.size()),
                   .n_kv_heads = static_cast<int>(table_.shape().n_kv_heads),
                   .head_dim = static_cast<int>(table_.shape().head_dim),
                   .source = tail(layers.first + lane, s.stream),
                   .target = window(lane, layers.window),
                   .from = sent<std::int32_t>(at_[n].gather_from),
                   .to = sent<std::int32_t>(at_[n].gather_to)};
  }
  return move_rows(layers.of(batch), stream);
}

float* DeviceCache::power_of_queries(std::uint32_t index, std::uint32_t of_stream) const {
  return query_power_.layer<float>(index) +
         std::size_t{of_stream} * table_.shape().n_kv_heads * table_.shape().head_dim;
}

std::size_t DeviceCache::device_bytes() const {
  std::size_t bytes = pool_.mapped_bytes();
  for (const LayeredArray* array :
       {&key_sets_, &key_orders_, &query_power_, &ranks_, &value_factors_, &tail_k_, &tail_v_,
        &ring_q_, &ring_lse_, &last_lse_}) {
    bytes += array->bytes();
  }
  for (const DeviceArray* array : {&block_cells_, &summary_,         &uploaded_,
                                   &window_,      &queries_,         &lse_,
                                   &probe_q_,     &probe_lse_,       &saliency_,
                                   &order_,       &workspace_,       &page_cells_,
                                   &partials_,    &prefill_tickets_, &prefill_partials_,
                                   &plan_items_,  &plan_pages_,      &tickets_,
                                   &dense_,       &listed_pages_,    &listed_sources_,
                                   &moved_from_,  &moved_to_,        &floats_,
                                   &iota_}) {
    bytes += array->bytes();
  }
  return bytes;
}

cache::ByteCount DeviceCache::bytes() const {
  const TableShape& shape = table_.shape();
  cache::ByteCount count;
  count.codes = pool_.mapped_bytes();
  count.params = key_sets_.bytes() + key_orders_.bytes() + value_factors_.bytes();
  count.masks = ranks_.bytes() + block_cells_.bytes();
  count.staging = tail_k_.bytes() + tail_v_.bytes() + query_power_.bytes() + ring_q_.bytes() +
                  ring_lse_.bytes() + last_lse_.bytes();
  count.slack = device_bytes() - count.codes - count.params - count.masks - count.staging;
  count.live_tokens = table_.live_tokens() * shape.n_layers;
  count.sealed_tokens = table_.sealed_tokens() * shape.n_layers;
  count.fp16 = count.live_tokens * shape.n_kv_heads * shape.head_dim * 2 * sizeof(HalfBits);
  return count;
}

}  // namespace zipcache::cuda
