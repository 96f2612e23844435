#include "cache/cuda/device_cache.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>

#include "kernels/cuda/plan.h"

namespace zipcache::cuda {
namespace {

// Stops at the first failure.
#define ZC_TRY(expression)                     \
  do {                                         \
    if (Status tried = (expression); !tried) { \
      return tried;                            \
    }                                          \
  } while (false)

Status copy_async(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                  Stream stream) {
  return bytes == 0 ? ok_status()
                    : to_status(cudaMemcpyAsync(to, from, bytes, kind, stream), "copy");
}

// Appends to the bytes of an upload, aligned; returns the offset.
template <typename T>
std::size_t append(std::vector<std::byte>& bytes, std::span<const T> values) {
  const std::size_t at = (bytes.size() + 15) / 16 * 16;
  bytes.resize(at + values.size_bytes());
  std::memcpy(bytes.data() + at, values.data(), values.size_bytes());
  return at;
}
template <typename T>
std::size_t append(std::vector<std::byte>& bytes, const std::vector<T>& values) {
  return append(bytes, std::span<const T>(values));
}

}  // namespace

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

RowsAt DeviceCache::window(std::size_t s) const {
  const std::int64_t token = std::int64_t{table_.shape().n_kv_heads} * table_.shape().head_dim;
  const std::int64_t stream = token * static_cast<std::int64_t>(window_tokens_);
  HalfBits* const k = window_.as<HalfBits>();
  HalfBits* const v = k + stream * static_cast<std::int64_t>(step_.streams.size());
  const auto n = static_cast<std::int64_t>(s);
  return {k + n * stream, v + n * stream, stream, token, table_.shape().head_dim};
}

// Which cells come and who sees what, from the device.
Expected<Step> DeviceCache::read_step(const StepTensors& in, Stream stream) {
  const std::size_t n_tokens = std::size_t{in.n_streams} * in.n_per_stream;
  const std::size_t n_flags = std::size_t{in.n_streams} * in.n_cells;
  const std::size_t row_bytes = n_tokens * (in.rows_are_narrow ? 4 : 8);
  const std::size_t flags_at = n_tokens * 4, rows_at = (flags_at + n_flags + 15) / 16 * 16;
  if (Status ok = summary_.ensure(rows_at, stream); !ok) {
    return ok.error();
  }
  if (Status ok = summary_host_.ensure(rows_at + row_bytes); !ok) {
    return ok.error();
  }
  auto* const host = summary_host_.as<std::byte>();
  auto* const device = summary_.as<std::byte>();
  if (in.mask != nullptr) {
    MaskSummaryParams mask;
    mask.n_planes = static_cast<int>(in.n_streams);
    mask.n_rows = static_cast<int>(in.n_per_stream);
    mask.n_cells = static_cast<int>(in.n_cells);
    mask.mask = in.mask;
    mask.plane_stride = in.mask_plane_stride;
    mask.row_stride = in.mask_row_stride;
    mask.row_counts = reinterpret_cast<std::int32_t*>(device);
    mask.flags = reinterpret_cast<std::uint8_t*>(device + flags_at);
    Status ok = to_status(cudaMemsetAsync(device, 0, flags_at, stream), "mask summary");
    ok = ok ? summarize_mask(mask, stream) : ok;
    ok = ok ? copy_async(host, device, flags_at + n_flags, cudaMemcpyDeviceToHost, stream) : ok;
    if (!ok) {
      return ok.error();
    }
  }
  Status ok = copy_async(host + rows_at, in.rows, row_bytes, cudaMemcpyDeviceToHost, stream);
  ok = ok ? to_status(cudaStreamSynchronize(stream), "reading a step") : ok;
  if (!ok) {
    return ok.error();
  }
  if (in.mask == nullptr) {
    std::memset(host + flags_at, kSeenByAny | kSeenByAll, n_flags);
    std::fill_n(reinterpret_cast<std::int32_t*>(host), n_tokens,
                static_cast<std::int32_t>(in.n_cells));
  }
  std::vector<std::int64_t> rows(n_tokens);
  for (std::size_t i = 0; i < n_tokens; ++i) {
    rows[i] = in.rows_are_narrow ? reinterpret_cast<const std::int32_t*>(host + rows_at)[i]
                                 : reinterpret_cast<const std::int64_t*>(host + rows_at)[i];
  }
  return table_.begin_step(
      {.first_stream = in.first_stream,
       .n_streams = in.n_streams,
       .n_per_stream = in.n_per_stream,
       .n_cells = in.n_cells,
       .rows = rows,
       .flags = {reinterpret_cast<const std::uint8_t*>(host + flags_at), n_flags},
       .row_counts = {reinterpret_cast<const std::int32_t*>(host), n_tokens},
       .needs_window = in.needs_window});
}

Status DeviceCache::begin_step(const StepTensors& in, Stream stream) {
  if (n_heads_ != 0 && n_heads_ != in.n_heads) {
    return unsupported("ZipCacheCUDA: layers of one cache have " + std::to_string(n_heads_) +
                       " and " + std::to_string(in.n_heads) +
                       " query heads, supported: one number");
  }
  n_heads_ = in.n_heads;
  in_ = in;
  Expected<Step> step = read_step(in, stream);
  if (!step) {
    return step.error();
  }
  step_ = std::move(*step);
  ZC_TRY(make_room(in, stream));
  ZC_TRY(upload(in, stream));
  if (step_.is_decode) {
    ZC_TRY(plan_decode_launch(stream));
  }
  repeatable_ = step_.is_decode ? launch_key() : 0;
  return ok_status();
}

Status DeviceCache::make_room(const StepTensors& in, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t heads = shape.n_kv_heads, dim = shape.head_dim,
                    streams = table_.streams_in_use();
  const std::size_t n_tokens = std::size_t{in.n_streams} * in.n_per_stream;
  const std::size_t query = std::size_t{in.n_heads} * dim;

  ZC_TRY(pool_.ensure(table_.pool_bytes()));
  ZC_TRY(key_sets_.ensure(table_.n_sets() * 2 * dim * sizeof(HalfBits), true, stream));
  if (table_.has_wide_channels()) {
    ZC_TRY(key_orders_.ensure(table_.n_sets() * dim, true, stream));
    ZC_TRY(query_power_.ensure(streams * heads * dim * sizeof(float), false, stream));
  }
  ZC_TRY(ranks_.ensure(table_.n_ranks() * sizeof(std::uint16_t), true, stream));
  ZC_TRY(value_factors_.ensure(streams * heads * dim * sizeof(float), false, stream));
  const std::size_t tail = streams * heads * kTailTokens * dim * sizeof(HalfBits);
  ZC_TRY(tail_k_.ensure(tail, false, stream));
  ZC_TRY(tail_v_.ensure(tail, false, stream));
  ZC_TRY(ring_q_.ensure(streams * kProbeRing * query * sizeof(HalfBits), false, stream));
  ZC_TRY(ring_lse_.ensure(streams * kProbeRing * in.n_heads * sizeof(float), false, stream));
  ZC_TRY(last_lse_.ensure(streams * in.n_heads * sizeof(float), false, stream));

  std::size_t n_window = 0, n_probes = kProbeRing, n_pack = 0, n_pages = 0;
  for (const StreamStep& s : step_.streams) {
    n_window = std::max(n_window, s.window_cells.size());
    n_probes = std::max(n_probes, s.probe_rows.size());
    std::size_t pages = 0;
    for (const auto& block : s.visible) {
      pages += block->pages.size();
    }
    n_pages = std::max(n_pages, pages);
    for (const StreamStep::Seal& seal : s.seals) {
      PackParams pack;
      pack.n_kv_heads = static_cast<int>(heads);
      pack.head_dim = static_cast<int>(dim);
      pack.n_key_sets = seal.block->classes.n_key_sets;
      n_pack = std::max(n_pack, pack_workspace_words(pack));
    }
  }
  window_tokens_ = n_window;
  ZC_TRY(window_.ensure(2 * in.n_streams * n_window * heads * dim * sizeof(HalfBits), stream));
  ZC_TRY(q_half_.ensure(n_tokens * query * sizeof(HalfBits), stream));
  ZC_TRY(lse_.ensure(n_tokens * in.n_heads * sizeof(float), stream));
  ZC_TRY(probe_q_.ensure(n_probes * query * sizeof(HalfBits), stream));
  ZC_TRY(probe_lse_.ensure(n_probes * in.n_heads * sizeof(float), stream));
  ZC_TRY(saliency_.ensure(heads * n_window * sizeof(float), stream));
  ZC_TRY(order_.ensure(heads * n_window * sizeof(std::int32_t), stream));
  ZC_TRY(workspace_.ensure(n_pack * sizeof(std::uint32_t), stream));
  if (!step_.is_decode) {
    ZC_TRY(page_cells_.ensure(n_pages * kPageTokens * sizeof(std::int32_t), stream));
  }
  return ok_status();
}

// All small arrays of the step in one copy. The arrays of every decode step come first, so that a
// captured launch finds them where they were.
Status DeviceCache::upload(const StepTensors& in, Stream stream) {
  std::vector<std::byte>& bytes = upload_bytes_;
  bytes.clear();
  const std::size_t heads = table_.shape().n_kv_heads;
  std::vector<std::int32_t> place, ring_at, tail_counts, zeros(heads, 0), positions;
  for (const StreamStep& s : step_.streams) {
    place.insert(place.end(), s.place.begin(), s.place.end());
    ring_at.insert(ring_at.end(), {s.ring_slot, s.last_ring_slot});
    tail_counts.push_back(static_cast<std::int32_t>(s.n_tail_in_decode));
  }
  place_ = append(bytes, place);
  ring_at_ = append(bytes, ring_at);
  tail_counts_ = append(bytes, tail_counts);
  zeros_ = append(bytes, zeros);
  at_.assign(step_.streams.size(), {});
  for (std::size_t n = 0; n < step_.streams.size(); ++n) {
    const StreamStep& s = step_.streams[n];
    Uploaded& at = at_[n];
    at.gather_from = append(bytes, s.gather_from);
    at.gather_to = append(bytes, s.gather_to);
    at.window_cells = append(bytes, s.window_cells);
    at.keep_from = append(bytes, s.keep_from);
    at.keep_to = append(bytes, s.keep_to);
    at.probe_rows = append(bytes, s.probe_rows);
    positions = s.probe_positions;
    if (step_.is_decode) {  // the newest tokens of the window, the last one this step's
      positions.clear();
      for (int slot = s.ring_first; slot < kProbeRing; ++slot) {
        positions.push_back(static_cast<std::int32_t>(s.window_cells.size()) - kProbeRing + slot);
      }
    }
    at.probe_positions = append(bytes, positions);
    at.n_probes = static_cast<std::uint32_t>(positions.size());
    for (const StreamStep::Seal& seal : s.seals) {
      at.seal_pages.push_back(append(bytes, seal.block->pages));
    }
    if (step_.is_decode) {
      continue;
    }
    std::vector<PageEntry> pages;
    std::vector<PageSource> sources;
    std::vector<std::int32_t> row_begin{0};
    for (std::uint32_t head = 0; head < heads; ++head) {
      // Each order of channels costs the kernel a reload of its queries: pages as they come first.
      for (const bool has_wide : {false, true}) {
        for (const auto& block : s.visible) {
          const auto n_pages = static_cast<std::uint32_t>(block->classes.n_pages());
          for (std::uint32_t page = 0; page < n_pages; ++page) {
            const PageEntry entry = block->pages[head * n_pages + page];
            if ((table_.classes()[entry.cls].wide_chunks > 0) != has_wide) {
              continue;
            }
            pages.push_back(entry);
            sources.push_back({block->first_rank + (head * n_pages + page) * kPageTokens,
                               block->first_cell, entry.tokens});
          }
        }
      }
      row_begin.push_back(static_cast<std::int32_t>(pages.size()));
    }
    at.n_pages = static_cast<std::uint32_t>(pages.size());
    at.pages = append(bytes, pages);
    at.sources = append(bytes, sources);
    at.row_begin = append(bytes, row_begin);
  }
  ZC_TRY(upload_host_.ensure(bytes.size()));
  ZC_TRY(uploaded_.ensure(bytes.size(), stream));
  std::memcpy(upload_host_.as<std::byte>(), bytes.data(), bytes.size());
  ZC_TRY(copy_async(uploaded_.as<std::byte>(), upload_host_.as<std::byte>(), bytes.size(),
                    cudaMemcpyHostToDevice, stream));
  if (!step_.is_decode && cells_version_ != table_.block_cells_version()) {
    const auto cells = table_.block_cells();
    ZC_TRY(block_cells_.ensure(cells.size_bytes(), stream));
    ZC_TRY(to_status(cudaMemcpyAsync(block_cells_.as<std::byte>(), cells.data(), cells.size_bytes(),
                                     cudaMemcpyHostToDevice, stream),
                     "cells"));
    cells_version_ = table_.block_cells_version();
  }
  (void)in;
  return ok_status();
}

// One row per (stream of the step, KV head); the plan holds until other blocks are in it.
Status DeviceCache::plan_decode_launch(Stream stream) {
  const TableShape& shape = table_.shape();
  std::vector<std::uint64_t> wanted{step_.first_stream, step_.streams.size()};
  for (const StreamStep& s : step_.streams) {
    wanted.push_back(0);
    for (const auto& block : s.visible) {
      wanted.push_back(block->serial);
    }
  }
  const auto& classes = table_.classes();
  const int group = static_cast<int>(in_.n_heads / shape.n_kv_heads);
  if (!decode_setup_) {
    const auto setup = prepare_decode(static_cast<int>(shape.head_dim), group, classes);
    if (!setup) {
      return setup.error();
    }
    decode_setup_ = *setup;
  }
  if (wanted == planned_for_) {
    return ok_status();
  }
  std::vector<PageEntry> pages;
  std::vector<std::int32_t> row_begin{0};
  for (const StreamStep& s : step_.streams) {
    for (std::uint32_t head = 0; head < shape.n_kv_heads; ++head) {
      // A change of class or scale set costs the kernel a reload. Class by class, but pages with
      // wide channels set by set: values of two widths share them.
      const std::size_t begin = pages.size();
      for (const auto& block : s.visible) {
        const auto n_pages = static_cast<std::ptrdiff_t>(block->classes.n_pages());
        const auto first = block->pages.begin() + head * n_pages;
        pages.insert(pages.end(), first, first + n_pages);
      }
      std::stable_sort(pages.begin() + static_cast<std::ptrdiff_t>(begin), pages.end(),
                       [&](const PageEntry& a, const PageEntry& b) {
                         const auto key = [&](const PageEntry& page) {
                           const bool has_wide = classes[page.cls].wide_chunks > 0;
                           return std::tuple(has_wide, has_wide ? page.set : 0, page.cls);
                         };
                         return key(a) < key(b);
                       });
      row_begin.push_back(static_cast<std::int32_t>(pages.size()));
    }
  }
  const std::size_t n_rows = row_begin.size() - 1;
  const std::vector<std::int32_t> set_base(n_rows, 0);
  PlanInput input;
  input.head_dim = static_cast<int>(shape.head_dim);
  input.classes = classes;
  input.pages = pages;
  input.row_begin = row_begin;
  input.set_base = set_base;
  input.resident_blocks = decode_setup_->resident_blocks;
  const DecodePlan plan = plan_decode(input);
  ZC_TRY(plan_items_.ensure(plan.items.size() * sizeof(WorkItem), stream));
  ZC_TRY(plan_pages_.ensure(std::max<std::size_t>(pages.size(), 1) * sizeof(PageEntry), stream));
  ZC_TRY(partials_.ensure(static_cast<std::size_t>(plan.n_partials) *
                              partial_floats(input.head_dim, group) * sizeof(float),
                          stream));
  ZC_TRY(tickets_.ensure(n_rows * sizeof(std::uint32_t), stream));
  // From pageable memory: the copies are done with it when they return.
  ZC_TRY(copy_async(plan_items_.as<WorkItem>(), plan.items.data(),
                    plan.items.size() * sizeof(WorkItem), cudaMemcpyHostToDevice, stream));
  ZC_TRY(copy_async(plan_pages_.as<PageEntry>(), pages.data(), pages.size() * sizeof(PageEntry),
                    cudaMemcpyHostToDevice, stream));
  n_blocks_ = plan.n_blocks;
  planned_for_ = std::move(wanted);
  return ok_status();
}

std::uint64_t DeviceCache::launch_key() const {
  std::uint64_t key = 0xcbf29ce484222325u;
  const auto mix = [&key](std::uint64_t value) { key = (key ^ value) * 0x100000001b3u; };
  mix(static_cast<std::uint64_t>(n_blocks_));  // another plan in the same places changes nothing
  mix(step_.first_stream << 8 | step_.streams.size());
  for (const void* pointer :
       {static_cast<const void*>(pool_.data()), key_sets_.layer<const void>(0),
        key_orders_.layer<const void>(0), value_factors_.layer<const void>(0),
        tail_k_.layer<const void>(0), tail_v_.layer<const void>(0), ring_q_.layer<const void>(0),
        ring_lse_.layer<const void>(0), last_lse_.layer<const void>(0),
        static_cast<const void*>(q_half_.as<std::byte>()),
        static_cast<const void*>(uploaded_.as<std::byte>()),
        static_cast<const void*>(plan_items_.as<std::byte>()),
        static_cast<const void*>(plan_pages_.as<std::byte>()),
        static_cast<const void*>(partials_.as<std::byte>()),
        static_cast<const void*>(tickets_.as<std::byte>())}) {
    mix(reinterpret_cast<std::uintptr_t>(pointer));
  }
  return key | 1;
}

Status DeviceCache::run_layer(std::uint32_t index, const LayerTensors& layer, Stream stream) {
  return step_.is_decode ? decode_layer(index, layer, stream) : window_layer(index, layer, stream);
}

IngestParams DeviceCache::ingest_params(const LayerTensors& layer, std::size_t n_per_sequence,
                                        const RowsAt& to) const {
  IngestParams put;
  put.n_sequences = static_cast<int>(step_.streams.size());
  put.n_per_sequence = static_cast<int>(n_per_sequence);
  put.n_kv_heads = static_cast<int>(table_.shape().n_kv_heads);
  put.n_heads = static_cast<int>(in_.n_heads);
  put.head_dim = static_cast<int>(table_.shape().head_dim);
  put.k = layer.k;
  put.v = layer.v;
  put.k_stride = layer.k_stride;
  put.v_stride = layer.v_stride;
  put.to = to;
  put.place = sent<std::int32_t>(place_);
  return put;
}

Status DeviceCache::gather(std::uint32_t index, std::size_t n, Stream stream) {
  const StreamStep& s = step_.streams[n];
  return move_rows({.n_tokens = static_cast<int>(s.gather_from.size()),
                    .n_kv_heads = static_cast<int>(table_.shape().n_kv_heads),
                    .head_dim = static_cast<int>(table_.shape().head_dim),
                    .source = tail(index, s.stream),
                    .target = window(n),
                    .from = sent<std::int32_t>(at_[n].gather_from),
                    .to = sent<std::int32_t>(at_[n].gather_to)},
                   stream);
}

Status DeviceCache::decode_layer(std::uint32_t index, const LayerTensors& layer, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t first = step_.first_stream;
  const std::size_t query = std::size_t{in_.n_heads} * shape.head_dim;
  float* const lse = last_lse_.layer<float>(index) + first * in_.n_heads;
  HalfBits* const ring_q = ring_q_.layer<HalfBits>(index) + first * kProbeRing * query;
  float* const ring_lse = ring_lse_.layer<float>(index) + first * kProbeRing * in_.n_heads;

  IngestParams put = ingest_params(layer, 1, tail(index, step_.first_stream));
  put.q = layer.q;
  put.q_sequence_stride = layer.q_stream_stride;
  put.q_query_stride = layer.q_query_stride;
  put.q_head_stride = layer.q_head_stride;
  put.q_half = q_half_.as<HalfBits>();
  put.ring_q = ring_q;
  put.ring_lse = ring_lse;
  put.last_lse = lse;
  put.ring_at = sent<std::int32_t>(ring_at_);
  put.ring = kProbeRing;
  ZC_TRY(ingest(put, stream));

  DecodeParams attend;
  attend.n_sequences = put.n_sequences;
  attend.n_kv_heads = put.n_kv_heads;
  attend.n_heads = put.n_heads;
  attend.head_dim = put.head_dim;
  attend.scale = layer.scale;
  attend.q = put.q_half;
  attend.out = layer.out;
  attend.lse = lse;
  attend.pool = pool(index);
  attend.pages = plan_pages_.as<PageEntry>();
  attend.key_sets = key_sets_.layer<HalfBits>(index);
  attend.key_orders = key_orders_.layer<std::uint8_t>(index);
  attend.value_factors =
      value_factors_.layer<float>(index) + first * shape.n_kv_heads * shape.head_dim;
  attend.tail_k = put.to.k;
  attend.tail_v = put.to.v;
  attend.tail_tokens = sent<std::int32_t>(tail_counts_);
  attend.items = plan_items_.as<WorkItem>();
  attend.n_blocks = n_blocks_;
  attend.start_early = true;  // behind ingest(), which writes neither pages nor items
  attend.partials = partials_.as<float>();
  attend.tickets = tickets_.as<std::uint32_t>();
  scale_ = layer.scale;
  return decode(attend, *decode_setup_, stream);
}

Status DeviceCache::end_step(Stream stream) {
  const bool seals = std::any_of(step_.streams.begin(), step_.streams.end(),
                                 [](const StreamStep& s) { return !s.seals.empty(); });
  for (std::uint32_t index = 0; step_.is_decode && seals && index < table_.shape().n_layers;
       ++index) {
    ZC_TRY(seal_decoded(index, stream));
  }
  return ok_status();
}

Status DeviceCache::seal_decoded(std::uint32_t index, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t first = step_.first_stream;
  const std::size_t query = std::size_t{in_.n_heads} * shape.head_dim;
  const float* const lse = last_lse_.layer<float>(index) + first * in_.n_heads;
  const HalfBits* const ring_q = ring_q_.layer<HalfBits>(index) + first * kProbeRing * query;
  float* const ring_lse = ring_lse_.layer<float>(index) + first * kProbeRing * in_.n_heads;
  for (std::size_t n = 0; n < step_.streams.size(); ++n) {
    const StreamStep& s = step_.streams[n];
    if (s.seals.empty()) {
      continue;
    }
    ZC_TRY(gather(index, n, stream));
    // The lse of this step's query has not got into the ring yet.
    float* const lse_of_stream = ring_lse + n * kProbeRing * in_.n_heads;
    ZC_TRY(copy_async(lse_of_stream + (kProbeRing - 1) * in_.n_heads, lse + n * in_.n_heads,
                      in_.n_heads * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    ProbeParams probes;
    probes.n_probes = static_cast<int>(at_[n].n_probes);
    probes.q = ring_q + (n * kProbeRing + s.ring_first) * query;
    probes.lse = lse_of_stream + s.ring_first * in_.n_heads;
    ZC_TRY(keep(index, n, scale_, probes, stream));
  }
  return ok_status();
}

Status DeviceCache::window_layer(std::uint32_t index, const LayerTensors& layer, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t n_per_stream = step_.n_per_stream;
  for (std::size_t n = 0; n < step_.streams.size(); ++n) {
    ZC_TRY(gather(index, n, stream));
  }
  const IngestParams put = ingest_params(layer, n_per_stream, window(0));
  ZC_TRY(ingest(put, stream));

  for (std::size_t n = 0; n < step_.streams.size(); ++n) {
    const StreamStep& s = step_.streams[n];
    const Uploaded& at = at_[n];
    PrefillParams attend;
    attend.n_queries = static_cast<int>(n_per_stream);
    attend.n_kv_heads = put.n_kv_heads;
    attend.n_heads = put.n_heads;
    attend.head_dim = put.head_dim;
    attend.scale = layer.scale;
    attend.softcap = layer.softcap;
    attend.slopes = layer.slopes;
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
    const RowsAt rows = window(n);
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
                            .n_heads = put.n_heads,
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
    ZC_TRY(keep(index, n, layer.scale, probes, stream));
  }
  return ok_status();
}

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
    probes.saliency = saliency_.as<float>();
    ZC_TRY(probe_saliency(probes, stream));
  } else if (!s.seals.empty()) {  // all alike
    ZC_TRY(to_status(cudaMemsetAsync(saliency_.as<float>(), 0,
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
                        .saliency = saliency_.as<float>() + seal.window_begin,
                        .head_stride = static_cast<std::int64_t>(n_window),
                        .order = order_.as<std::int32_t>(),
                        .kept = ranks_.layer<std::uint16_t>(index) + block.first_rank,
                        .kept_stride = block.rank_stride()},
                       stream));
    PackParams p;
    p.n_tokens = static_cast<int>(block.n_tokens);
    p.n_kv_heads = static_cast<int>(shape.n_kv_heads);
    p.head_dim = static_cast<int>(shape.head_dim);
    p.k = rows.k + seal.window_begin * rows.token_stride;
    p.v = rows.v + seal.window_begin * rows.token_stride;
    p.token_stride = rows.token_stride;
    p.order = order_.as<std::int32_t>();
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
      p.key_clip[cls.cls] = cls.key_clip;
      p.value_clip[cls.cls] = cls.value_clip;
    }
    p.n_key_sets = block.classes.n_key_sets;
    p.wide_clip = table_.policy().key.rules.wide_clip;
    p.keep_length = table_.policy().value.rules.keep_length;
    p.query_power = *power;
    p.keep_factors = !seal.is_first;
    p.pool = const_cast<std::uint8_t*>(pool(index));
    p.pages = sent<PageEntry>(at.seal_pages[i]);
    p.key_sets =
        key_sets_.layer<HalfBits>(index) + std::size_t{block.first_set} * 2 * shape.head_dim;
    p.key_orders =
        key_orders_.layer<std::uint8_t>(index) + std::size_t{block.first_set} * shape.head_dim;
    p.value_factors = value_factors_.layer<float>(index) +
                      std::size_t{s.stream} * shape.n_kv_heads * shape.head_dim;
    p.workspace = workspace_.as<std::uint32_t>();
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

std::size_t DeviceCache::device_bytes() const {
  std::size_t bytes = pool_.mapped_bytes();
  for (const LayeredArray* array :
       {&key_sets_, &key_orders_, &query_power_, &ranks_, &value_factors_, &tail_k_, &tail_v_,
        &ring_q_, &ring_lse_, &last_lse_}) {
    bytes += array->bytes();
  }
  for (const DeviceArray* array :
       {&block_cells_, &summary_, &uploaded_, &window_, &q_half_, &lse_, &probe_q_, &probe_lse_,
        &saliency_, &order_, &workspace_, &page_cells_, &partials_, &prefill_tickets_,
        &prefill_partials_, &plan_items_, &plan_pages_, &tickets_}) {
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
