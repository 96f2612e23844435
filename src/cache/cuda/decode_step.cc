// The way of a decode step: the launch plan of all layers, one launch per layer, sealing after the
// last one.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/step_status.h"
#include "kernels/cuda/plan.h"

namespace zipcache::cuda {

// One row per (stream of the step, KV head); the plan holds until other blocks are visible. At 8 x
// 8k the host takes 1 ms for it.
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
      // Block by block, so that each part of a row folds the query for its own few scale sets.
      for (const auto& block : s.visible) {
        const auto n_pages = static_cast<std::ptrdiff_t>(block->classes.n_pages());
        const auto first = block->pages.begin() + head * n_pages;
        pages.insert(pages.end(), first, first + n_pages);
      }
      row_begin.push_back(static_cast<std::int32_t>(pages.size()));
    }
  }
  const std::size_t n_rows = row_begin.size() - 1;
  const std::vector<std::int32_t> set_base(n_rows, 0);
  PlanInput input;
  input.head_dim = static_cast<int>(shape.head_dim);
  input.group = group;
  input.n_kv_heads = static_cast<int>(shape.n_kv_heads);
  input.classes = classes;
  input.pages = pages;
  input.row_begin = row_begin;
  input.set_base = set_base;
  input.resident_blocks = decode_setup_->resident_blocks;
  input.resident_clusters = decode_setup_->resident_clusters;
  input.min_block_bytes = kShortRunsBlockBytes;
  // One launch for all plans: to capture a step anew takes longer than the step.
  input.n_blocks = decode_setup_->resident_blocks;
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
  cluster_blocks_ = plan.cluster_blocks;
  planned_for_ = std::move(wanted);
  return ok_status();
}

std::uint64_t DeviceCache::launch_key() const {
  std::uint64_t key = 0xcbf29ce484222325u;
  const auto mix = [&key](std::uint64_t value) { key = (key ^ value) * 0x100000001b3u; };
  // Another plan in the same places changes nothing.
  mix(static_cast<std::uint64_t>(n_blocks_));
  mix(static_cast<std::uint64_t>(cluster_blocks_));
  mix(step_.first_stream << 8 | step_.streams.size());
  for (const void* pointer :
       {static_cast<const void*>(pool_.data()), key_sets_.layer<const void>(0),
        key_orders_.layer<const void>(0), value_factors_.layer<const void>(0),
        tail_k_.layer<const void>(0), tail_v_.layer<const void>(0), ring_q_.layer<const void>(0),
        ring_lse_.layer<const void>(0), last_lse_.layer<const void>(0),
        static_cast<const void*>(uploaded_.as<std::byte>()),
        static_cast<const void*>(queries_.as<std::byte>()),
        static_cast<const void*>(plan_items_.as<std::byte>()),
        static_cast<const void*>(plan_pages_.as<std::byte>()),
        static_cast<const void*>(partials_.as<std::byte>()),
        static_cast<const void*>(tickets_.as<std::byte>())}) {
    mix(reinterpret_cast<std::uintptr_t>(pointer));
  }
  return key | 1;
}

// [streams, n_heads, head_dim]: the engine's, which lie so nearly always, or a copy.
Expected<const float*> DeviceCache::contiguous_queries(const LayerTensors& layer, Stream stream) {
  const std::int64_t dim = table_.shape().head_dim, query = dim * in_.n_heads;
  const std::size_t n_streams = step_.streams.size();
  if (layer.q_head_stride == dim && (layer.q_stream_stride == query || n_streams == 1)) {
    return layer.q;
  }
  float* const copy = queries_.as<float>();  // room for them: make_room()
  for (std::size_t n = 0; n < n_streams; ++n) {
    const auto at = static_cast<std::int64_t>(n);
    const Status copied = to_status(
        cudaMemcpy2DAsync(copy + at * query, dim * sizeof(float),
                          layer.q + at * layer.q_stream_stride, layer.q_head_stride * sizeof(float),
                          dim * sizeof(float), in_.n_heads, cudaMemcpyDeviceToDevice, stream),
        "queries");
    if (!copied) {
      return copied.error();
    }
  }
  return static_cast<const float*>(copy);
}

Status DeviceCache::decode_layer(std::uint32_t index, const LayerTensors& layer, Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t first = step_.first_stream;
  const std::size_t query = std::size_t{in_.n_heads} * shape.head_dim;
  const RowsAt tails = tail(index, step_.first_stream);
  const Expected<const float*> q = contiguous_queries(layer, stream);
  if (!q) {
    return q.error();
  }

  DecodeParams attend;
  attend.n_sequences = static_cast<int>(step_.streams.size());
  attend.n_kv_heads = static_cast<int>(shape.n_kv_heads);
  attend.n_heads = static_cast<int>(in_.n_heads);
  attend.head_dim = static_cast<int>(shape.head_dim);
  attend.scale = layer.scale;
  attend.q = *q;
  attend.out = layer.out;
  attend.lse = last_lse_.layer<float>(index) + first * in_.n_heads;
  attend.pool = pool(index);
  attend.pages = plan_pages_.as<PageEntry>();
  attend.key_sets = key_sets_.layer<HalfBits>(index);
  attend.key_orders = key_orders_.layer<std::uint8_t>(index);
  attend.value_factors =
      value_factors_.layer<float>(index) + first * shape.n_kv_heads * shape.head_dim;
  attend.tail_k = tails.k;
  attend.tail_v = tails.v;
  attend.tail_tokens = sent<std::int32_t>(tail_counts_);
  attend.store.k = layer.k;
  attend.store.v = layer.v;
  attend.store.k_stride = layer.k_stride;
  attend.store.v_stride = layer.v_stride;
  attend.store.ring_q = ring_q_.layer<HalfBits>(index) + first * kProbeRing * query;
  attend.store.ring_lse = ring_lse_.layer<float>(index) + first * kProbeRing * in_.n_heads;
  attend.store.ring_at = sent<std::int32_t>(ring_at_);
  attend.store.ring = kProbeRing;
  attend.items = plan_items_.as<WorkItem>();
  attend.n_blocks = n_blocks_;
  attend.cluster_blocks = cluster_blocks_;
  attend.start_early = true;  // behind a kernel of the engine, which writes neither pages nor items
  attend.partials = partials_.as<float>();
  attend.tickets = tickets_.as<std::uint32_t>();
  scale_ = layer.scale;
  return decode(attend, *decode_setup_, stream);
}

Status DeviceCache::end_step(Stream stream) {
  bool sealed = false;
  for (std::size_t n = 0; step_.is_decode && n < step_.streams.size(); ++n) {
    StreamStep& s = step_.streams[n];
    if (!s.seals.empty()) {
      ZC_TRY(seal_decoded(n, stream));
      std::ranges::transform(s.seals, std::back_inserter(s.visible), &StreamStep::Seal::block);
      sealed = true;
    }
  }
  if (sealed) {  // what the next step will most likely see, while the device has this one to do
    ZC_TRY(plan_decode_launch(stream));
  }
  for (const StreamStep& s : step_.streams) {
    if (!s.restored_from.empty()) {
      restored_.erase(s.stream);
    }
  }
  return ok_status();
}

// Some layers at a time: one by one they were hundreds of small launches, 20 ms after a step of 8
// streams.
Status DeviceCache::seal_decoded(std::size_t n, Stream stream) {
  const TableShape& shape = table_.shape();
  const StreamStep& s = step_.streams[n];
  const std::size_t query = std::size_t{in_.n_heads} * shape.head_dim;
  const std::size_t ring = (step_.first_stream + n) * kProbeRing;
  // The lse of this step's query has not got into the ring yet.
  ZC_TRY(to_status(
      cudaMemcpy2DAsync(ring_lse_.layer<float>(0) + (ring + kProbeRing - 1) * in_.n_heads,
                        ring_lse_.stride_bytes(),
                        last_lse_.layer<float>(0) + (step_.first_stream + n) * in_.n_heads,
                        last_lse_.stride_bytes(), in_.n_heads * sizeof(float), shape.n_layers,
                        cudaMemcpyDeviceToDevice, stream),
      "probes"));
  for (std::uint32_t first = 0; first < shape.n_layers; first += kMaxBatch) {
    const LayerBatch layers{first, std::min<std::uint32_t>(kMaxBatch, shape.n_layers - first), 0};
    ZC_TRY(gather(layers, n, stream));
    std::array<ProbeParams, kMaxBatch> probes;
    for (std::uint32_t lane = 0; lane < layers.n; ++lane) {
      const std::size_t at = ring + s.ring_first;
      probes[lane].n_probes = static_cast<int>(at_[n].n_probes);
      probes[lane].q = ring_q_.layer<HalfBits>(first + lane) + at * query;
      probes[lane].lse = ring_lse_.layer<float>(first + lane) + at * in_.n_heads;
    }
    ZC_TRY(keep(layers, n, scale_, layers.of(probes), stream));
  }
  return ok_status();
}

}  // namespace zipcache::cuda
