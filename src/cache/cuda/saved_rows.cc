// Rows between the cache and the host outside of steps: what saving, restoring and copying
// sequences asks for. Restored rows wait in host memory until the stream's next step takes them
// into its window, one layer at a time, so that they never fill the device as fp16.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/step_status.h"
#include "kernels/cuda/page_rows.h"

namespace zipcache::cuda {
namespace {

constexpr std::uint32_t kChunkRows = 4096;  // that a read keeps on the device

bool is_zero(const HalfBits* row, std::size_t n) {
  return std::all_of(row, row + n, [](HalfBits x) { return x == 0; });
}

}  // namespace

RowsAt DeviceCache::dense_rows(HalfBits* k, HalfBits* v) const {
  const TableShape& shape = table_.shape();
  return {k, v, 0, std::int64_t{shape.n_kv_heads} * shape.head_dim, shape.head_dim};
}

// Pages of blocks as a launch's list, head after head, with a row for every slot.
Status DeviceCache::list_pages(std::uint32_t index,
                               std::span<const std::shared_ptr<PagedBlock>> blocks,
                               const std::int32_t* rows, bool by_cell, Stream stream) {
  std::vector<PageEntry> pages;
  std::vector<PageSource> sources;
  for (std::uint32_t head = 0; head < table_.shape().n_kv_heads; ++head) {
    for (const auto& block : blocks) {
      const auto n_pages = static_cast<std::uint32_t>(block->classes.n_pages());
      for (std::uint32_t page = 0; page < n_pages; ++page) {
        const PageEntry entry = block->pages[head * n_pages + page];
        pages.push_back(entry);
        sources.push_back({block->first_rank + (head * n_pages + page) * kPageTokens,
                           by_cell ? block->first_cell : 0, entry.tokens});
      }
    }
  }
  ZC_TRY(send(listed_pages_, pages, stream));
  ZC_TRY(send(listed_sources_, sources, stream));
  ZC_TRY(page_cells_.ensure(pages.size() * kPageTokens * sizeof(std::int32_t), stream));
  n_listed_ = static_cast<int>(pages.size());
  return list_page_cells({.n_pages = n_listed_,
                          .pages = listed_sources_.as<PageSource>(),
                          .kept = ranks_.layer<std::uint16_t>(index),
                          .block_cells = rows,
                          .page_cells = page_cells_.as<std::int32_t>()},
                         stream);
}

Status DeviceCache::unpack_listed(std::uint32_t index, std::uint32_t of_stream,
                                  std::uint32_t first_row, std::uint32_t end_row, const RowsAt& to,
                                  Stream stream) {
  const TableShape& shape = table_.shape();
  UnpackParams unpack;
  unpack.n_pages = n_listed_;
  unpack.n_kv_heads = static_cast<int>(shape.n_kv_heads);
  unpack.head_dim = static_cast<int>(shape.head_dim);
  unpack.pool = pool(index);
  std::ranges::copy(table_.classes(), unpack.classes);
  unpack.pages = listed_pages_.as<PageEntry>();
  unpack.page_rows = page_cells_.as<std::int32_t>();
  unpack.first_row = static_cast<int>(first_row);
  unpack.end_row = static_cast<int>(end_row);
  unpack.key_sets = key_sets_.layer<HalfBits>(index);
  unpack.key_orders = key_orders_.layer<std::uint8_t>(index);
  unpack.value_factors = value_factors_.layer<float>(index) +
                         std::size_t{of_stream} * shape.n_kv_heads * shape.head_dim;
  unpack.to = to;
  return unpack_pages(unpack, stream);
}

Status DeviceCache::read_rows(std::uint32_t index, bool is_key, std::uint32_t of_stream,
                              std::uint32_t first_cell, std::uint32_t n_cells, HalfBits* out,
                              Stream stream) {
  const std::size_t row = std::size_t{table_.shape().n_kv_heads} * table_.shape().head_dim;
  const std::vector<std::int32_t> tail_cells = table_.tail_cells(of_stream);
  for (std::uint32_t done = 0; done < n_cells; done += kChunkRows) {
    const std::uint32_t begin = first_cell + done;
    const std::uint32_t n = std::min(kChunkRows, n_cells - done), end = begin + n;
    const auto is_wanted = [&](std::int32_t cell) {
      return cell >= static_cast<std::int32_t>(begin) && cell < static_cast<std::int32_t>(end);
    };
    ZC_TRY(dense_.ensure(2 * n * row * sizeof(HalfBits), stream));
    ZC_TRY(to_status(
        cudaMemsetAsync(dense_.as<HalfBits>(), 0, 2 * n * row * sizeof(HalfBits), stream), "rows"));
    const RowsAt rows = dense_rows(dense_.as<HalfBits>(), dense_.as<HalfBits>() + n * row);

    std::vector<std::int32_t> from, to;
    for (std::size_t place = 0; place < tail_cells.size(); ++place) {
      if (is_wanted(tail_cells[place])) {
        from.push_back(static_cast<std::int32_t>(place));
        to.push_back(tail_cells[place] - static_cast<std::int32_t>(begin));
      }
    }
    ZC_TRY(send(moved_from_, from, stream));
    ZC_TRY(send(moved_to_, to, stream));
    ZC_TRY(move_rows({.n_tokens = static_cast<int>(from.size()),
                      .n_kv_heads = static_cast<int>(table_.shape().n_kv_heads),
                      .head_dim = static_cast<int>(table_.shape().head_dim),
                      .source = tail(index, of_stream),
                      .target = rows,
                      .from = moved_from_.as<std::int32_t>(),
                      .to = moved_to_.as<std::int32_t>()},
                     stream));
    std::vector<std::shared_ptr<PagedBlock>> blocks;
    for (const auto& block : table_.blocks(of_stream)) {
      if (std::any_of(block->cells.begin(), block->cells.end(), is_wanted)) {
        blocks.push_back(block);
      }
    }
    if (!blocks.empty()) {
      ZC_TRY(send_block_cells(stream));
      ZC_TRY(list_pages(index, blocks, block_cells_.as<std::int32_t>(), true, stream));
      ZC_TRY(unpack_listed(index, of_stream, begin, end, rows, stream));
    }
    HalfBits* const chunk = out + done * row;
    ZC_TRY(copy_async(chunk, is_key ? rows.k : rows.v, n * row * sizeof(HalfBits),
                      cudaMemcpyDeviceToHost, stream));
    ZC_TRY(to_status(cudaStreamSynchronize(stream), "reading rows"));
    const std::vector<std::int32_t> restored = table_.restored_cells(of_stream);
    for (std::size_t slot = 0; slot < restored.size(); ++slot) {
      if (is_wanted(restored[slot])) {
        const std::span<const HalfBits> kept = restored_row(of_stream, index, is_key, slot);
        std::copy(kept.begin(), kept.end(), chunk + (restored[slot] - begin) * row);
      }
    }
  }
  return ok_status();
}

// Zeros over nothing are dropped, so that whole streams can be restored without cells coming to
// life that hold nothing.
Status DeviceCache::write_rows(std::uint32_t index, bool is_key, std::uint32_t of_stream,
                               std::uint32_t first_cell, std::uint32_t n_cells,
                               const HalfBits* rows) {
  const std::size_t row = std::size_t{table_.shape().n_kv_heads} * table_.shape().head_dim;
  std::vector<std::int32_t> cells;
  for (std::uint32_t i = 0; i < n_cells; ++i) {
    if (table_.holds(of_stream, first_cell + i) || !is_zero(rows + i * row, row)) {
      cells.push_back(static_cast<std::int32_t>(first_cell + i));
    }
  }
  const std::vector<std::int32_t> slots = table_.restore(of_stream, cells);
  auto& arrays = restored_[of_stream];
  arrays.resize(std::size_t{table_.shape().n_layers} * 2);
  std::vector<HalfBits>& kept = arrays[index * 2 + (is_key ? 0 : 1)];
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const std::size_t at = slots[i] * row;
    if (kept.size() < at + row) {
      kept.resize(at + (cells.size() - i) * row);
    }
    std::copy_n(rows + (cells[i] - static_cast<std::int32_t>(first_cell)) * row, row,
                kept.data() + at);
  }
  return ok_status();
}

std::span<const HalfBits> DeviceCache::restored_row(std::uint32_t of_stream, std::uint32_t index,
                                                    bool is_key, std::size_t slot) const {
  const std::size_t row = std::size_t{table_.shape().n_kv_heads} * table_.shape().head_dim;
  const auto found = restored_.find(of_stream);
  if (found == restored_.end()) {
    return {};
  }
  const std::vector<HalfBits>& kept = found->second[index * 2 + (is_key ? 0 : 1)];
  return kept.size() < (slot + 1) * row ? std::span<const HalfBits>()
                                        : std::span(kept).subspan(slot * row, row);
}

// Restored rows into the window of the n-th stream of the step, in runs of neighbours. A layer that
// got none has zeros.
Status DeviceCache::take_restored(std::uint32_t index, std::size_t n, Stream stream) {
  const StreamStep& s = step_.streams[n];
  const std::size_t row = std::size_t{table_.shape().n_kv_heads} * table_.shape().head_dim;
  const RowsAt rows = window(0, n);
  for (std::size_t begin = 0, end = 0; begin < s.restored_from.size(); begin = end) {
    for (end = begin + 1;
         end < s.restored_from.size() && s.restored_from[end] == s.restored_from[end - 1] + 1 &&
         s.restored_to[end] == s.restored_to[end - 1] + 1;
         ++end) {
    }
    for (const bool is_key : {true, false}) {
      HalfBits* const to = (is_key ? rows.k : rows.v) + s.restored_to[begin] * rows.token_stride;
      const std::vector<HalfBits>& kept = restored_[s.stream][index * 2 + (is_key ? 0 : 1)];
      const std::size_t at = std::min(s.restored_from[begin] * row, kept.size());
      const std::size_t size = std::min((end - begin) * row, kept.size() - at);
      ZC_TRY(copy_async(to, kept.data() + at, size * sizeof(HalfBits), cudaMemcpyHostToDevice,
                        stream));
      ZC_TRY(to_status(
          cudaMemsetAsync(to + size, 0, ((end - begin) * row - size) * sizeof(HalfBits), stream),
          "restored rows"));
    }
  }
  return ok_status();
}

// Pages are shared; what a stream has of its own is copied, of all layers.
Status DeviceCache::copy_stream(std::uint32_t from, std::uint32_t to, Stream stream) {
  if (from == to) {
    return ok_status();
  }
  table_.copy_stream(from, to);
  restored_.erase(to);
  if (const auto found = restored_.find(from); found != restored_.end()) {
    restored_[to] = found->second;
  }
  ZC_TRY(make_room_for_streams(stream));
  const TableShape& shape = table_.shape();
  const std::size_t head = std::size_t{shape.n_kv_heads} * shape.head_dim;
  const auto copy = [&](const LayeredArray& array, std::size_t bytes) {
    return to_status(
        cudaMemcpy2DAsync(array.layer<std::byte>(0) + to * bytes, array.stride_bytes(),
                          array.layer<std::byte>(0) + from * bytes, array.stride_bytes(), bytes,
                          shape.n_layers, cudaMemcpyDeviceToDevice, stream),
        "copying a stream");
  };
  ZC_TRY(copy(value_factors_, head * sizeof(float)));
  if (table_.has_wide_channels()) {
    ZC_TRY(copy(query_power_, head * sizeof(float)));
  }
  ZC_TRY(copy(tail_k_, kTailTokens * head * sizeof(HalfBits)));
  ZC_TRY(copy(tail_v_, kTailTokens * head * sizeof(HalfBits)));
  return to_status(cudaStreamSynchronize(stream), "copying a stream");
}

}  // namespace zipcache::cuda
