// The beginning of a step: what comes and who sees it, the plan for all layers, memory, one upload.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/mask_summary.h"
#include "cache/cuda/step_status.h"

namespace zipcache::cuda {
namespace {

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

// Who sees what and which cells come, into flags_, row_counts_ and rows_.
Status DeviceCache::summarize(const StepTensors& in, Stream stream) {
  const std::size_t n_tokens = std::size_t{in.n_streams} * in.n_per_stream;
  const std::size_t n_flags = std::size_t{in.n_streams} * in.n_cells;
  const std::size_t row_bytes = n_tokens * (in.rows_are_narrow ? 4 : 8);
  const std::size_t flags_at = n_tokens * 4, rows_at = (flags_at + n_flags + 15) / 16 * 16;
  const bool mask_is_here = in.mask == nullptr || !in.host_mask.empty();
  const bool rows_are_here = in.host_rows.size() >= row_bytes;
  flags_.resize(n_flags);
  row_counts_.resize(n_tokens);
  rows_.resize(n_tokens);

  MaskSummaryParams mask;
  mask.n_planes = static_cast<int>(in.n_streams);
  mask.n_rows = static_cast<int>(in.n_per_stream);
  mask.n_cells = static_cast<int>(in.n_cells);
  mask.mask = in.mask;
  mask.plane_stride = in.mask_plane_stride;
  mask.row_stride = in.mask_row_stride;
  std::byte* host = nullptr;
  if (!mask_is_here || !rows_are_here) {
    ZC_TRY(summary_.ensure(rows_at, stream));
    ZC_TRY(summary_host_.ensure(rows_at + row_bytes));
    host = summary_host_.as<std::byte>();
  }
  if (!mask_is_here) {
    auto* const device = summary_.as<std::byte>();
    mask.row_counts = reinterpret_cast<std::int32_t*>(device);
    mask.flags = reinterpret_cast<std::uint8_t*>(device + flags_at);
    ZC_TRY(to_status(cudaMemsetAsync(device, 0, flags_at, stream), "mask summary"));
    ZC_TRY(summarize_mask(mask, stream));
    ZC_TRY(copy_async(host, device, flags_at + n_flags, cudaMemcpyDeviceToHost, stream));
  }
  if (!rows_are_here) {
    ZC_TRY(copy_async(host + rows_at, in.rows, row_bytes, cudaMemcpyDeviceToHost, stream));
  }
  if (host != nullptr) {
    ZC_TRY(to_status(cudaStreamSynchronize(stream), "reading a step"));
  }
  if (in.mask == nullptr) {
    std::fill(flags_.begin(), flags_.end(), kSeenByAny | kSeenByAll);
    std::fill(row_counts_.begin(), row_counts_.end(), static_cast<std::int32_t>(in.n_cells));
  } else if (mask_is_here) {
    mask.mask = reinterpret_cast<const HalfBits*>(in.host_mask.data());
    mask.flags = flags_.data();
    mask.row_counts = row_counts_.data();
    summarize_mask_on_host(mask);
  } else {
    std::memcpy(row_counts_.data(), host, flags_at);
    std::memcpy(flags_.data(), host + flags_at, n_flags);
  }
  const std::byte* const rows = rows_are_here ? in.host_rows.data() : host + rows_at;
  for (std::size_t i = 0; i < n_tokens; ++i) {
    std::int32_t narrow = 0;
    std::memcpy(in.rows_are_narrow ? static_cast<void*>(&narrow) : &rows_[i],
                rows + i * (in.rows_are_narrow ? 4 : 8), in.rows_are_narrow ? 4 : 8);
    rows_[i] = in.rows_are_narrow ? narrow : rows_[i];
  }
  return ok_status();
}

Expected<Step> DeviceCache::read_step(const StepTensors& in, Stream stream) {
  if (Status ok = summarize(in, stream); !ok) {
    return ok.error();
  }
  return table_.begin_step({.first_stream = in.first_stream,
                            .n_streams = in.n_streams,
                            .n_per_stream = in.n_per_stream,
                            .n_cells = in.n_cells,
                            .rows = rows_,
                            .flags = flags_,
                            .row_counts = row_counts_,
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
  in_.host_rows = in_.host_mask = {};  // good for this call only
  in_.slopes = {};
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
  const std::size_t heads = shape.n_kv_heads, dim = shape.head_dim;
  const std::size_t n_tokens = std::size_t{in.n_streams} * in.n_per_stream;
  const std::size_t query = std::size_t{in.n_heads} * dim;

  ZC_TRY(make_room_for_pages(stream));
  ZC_TRY(make_room_for_streams(stream));

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
  n_lanes_ = step_.is_decode ? kMaxBatch : 1;
  n_windows_ = step_.is_decode ? 1 : in.n_streams;  // decode seals stream after stream
  const auto ensure_lanes = [&](DeviceArray& scratch, std::size_t bytes) {
    return scratch.ensure(n_lanes_ * ((bytes + 255) / 256 * 256), stream);
  };
  ZC_TRY(ensure_lanes(window_, 2 * n_windows_ * n_window * heads * dim * sizeof(HalfBits)));
  ZC_TRY(ensure_lanes(saliency_, heads * n_window * sizeof(float)));
  ZC_TRY(ensure_lanes(order_, heads * n_window * sizeof(std::int32_t)));
  ZC_TRY(ensure_lanes(workspace_, n_pack * sizeof(std::uint32_t)));
  if (step_.is_decode) {
    ZC_TRY(queries_.ensure(n_tokens * query * sizeof(float), stream));
  }
  ZC_TRY(lse_.ensure(n_tokens * in.n_heads * sizeof(float), stream));
  ZC_TRY(probe_q_.ensure(n_probes * query * sizeof(HalfBits), stream));
  ZC_TRY(probe_lse_.ensure(n_probes * in.n_heads * sizeof(float), stream));
  if (!step_.is_decode) {
    ZC_TRY(page_cells_.ensure(n_pages * kPageTokens * sizeof(std::int32_t), stream));
  }
  return ok_status();
}

// What sealed tokens have.
Status DeviceCache::make_room_for_pages(Stream stream) {
  const std::size_t dim = table_.shape().head_dim;
  ZC_TRY(pool_.ensure(table_.pool_bytes()));
  ZC_TRY(key_sets_.ensure(table_.n_sets() * 2 * dim * sizeof(HalfBits), true, stream));
  if (table_.has_wide_channels()) {
    ZC_TRY(key_orders_.ensure(table_.n_sets() * dim, true, stream));
  }
  return ranks_.ensure(table_.n_ranks() * sizeof(std::uint16_t), true, stream);
}

// What a stream has of its own.
Status DeviceCache::make_room_for_streams(Stream stream) {
  const TableShape& shape = table_.shape();
  const std::size_t streams = table_.streams_in_use();
  const std::size_t head = std::size_t{shape.n_kv_heads} * shape.head_dim;
  const std::size_t query = std::size_t{n_heads_} * shape.head_dim;
  ZC_TRY(value_factors_.ensure(streams * head * sizeof(float), false, stream));
  if (table_.has_wide_channels()) {
    ZC_TRY(query_power_.ensure(streams * head * sizeof(float), false, stream));
  }
  const std::size_t tail = streams * kTailTokens * head * sizeof(HalfBits);
  ZC_TRY(tail_k_.ensure(tail, false, stream));
  ZC_TRY(tail_v_.ensure(tail, false, stream));
  ZC_TRY(ring_q_.ensure(streams * kProbeRing * query * sizeof(HalfBits), false, stream));
  ZC_TRY(ring_lse_.ensure(streams * kProbeRing * n_heads_ * sizeof(float), false, stream));
  return last_lse_.ensure(streams * n_heads_ * sizeof(float), false, stream);
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
  has_slopes_ = !in.slopes.empty();
  slopes_ = append(bytes, in.slopes);
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
  ZC_TRY(upload_host_.in_use(stream));
  if (!step_.is_decode) {
    ZC_TRY(send_block_cells(stream));
  }
  return ok_status();
}

Status DeviceCache::send_block_cells(Stream stream) {
  if (cells_version_ == table_.block_cells_version()) {
    return ok_status();
  }
  const auto cells = table_.block_cells();
  ZC_TRY(block_cells_.ensure(cells.size_bytes(), stream));
  ZC_TRY(copy_async(block_cells_.as<std::byte>(), cells.data(), cells.size_bytes(),
                    cudaMemcpyHostToDevice, stream));
  cells_version_ = table_.block_cells_version();
  return ok_status();
}

}  // namespace zipcache::cuda
