// Context shift: keys in the tail and restored ones are turned where they are; those of pages are
// unpacked, turned and packed again with their ranks and classes. Values go through unchanged:
// their codes span what they spanned.
#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>

#include "cache/cuda/device_cache.h"
#include "cache/cuda/step_status.h"
#include "kernels/cuda/page_rows.h"

namespace zipcache::cuda {
namespace {

std::vector<std::int32_t> shifts_of(std::span<const std::int32_t> shifts,
                                    std::span<const std::int32_t> cells) {
  std::vector<std::int32_t> of_cells;
  for (const std::int32_t cell : cells) {
    of_cells.push_back(cell >= 0 ? shifts[cell] : 0);
  }
  return of_cells;
}

bool any(const std::vector<std::int32_t>& positions) {
  return std::any_of(positions.begin(), positions.end(), [](std::int32_t p) { return p != 0; });
}

}  // namespace

// The keys of as many rows as there are positions.
Status DeviceCache::rotate(const RowsAt& rows, const std::vector<std::int32_t>& positions,
                           const RotateKeys& rope, Stream stream) {
  ConvertParams p;
  p.n_tokens = static_cast<int>(positions.size());
  p.n_kv_heads = static_cast<int>(table_.shape().n_kv_heads);
  p.head_dim = static_cast<int>(table_.shape().head_dim);
  p.rows = rows;
  ZC_TRY(floats_.ensure(positions.size() * p.n_kv_heads * p.head_dim * sizeof(float), stream));
  p.floats = floats_.as<float>();
  ZC_TRY(keys_to_floats(p, stream));
  ZC_TRY(send(moved_to_, positions, stream));
  ZC_TRY(to_status(cudaStreamSynchronize(stream), "shifting keys"));
  ZC_TRY(rope(p.floats, moved_to_.as<std::int32_t>(), static_cast<std::uint32_t>(p.n_tokens)));
  return floats_to_keys(p, stream);
}

// Copied streams share pages; what turns needs its own, in all layers.
Status DeviceCache::own_pages(std::uint32_t of_stream, std::span<const std::int32_t> shifts,
                              Stream stream) {
  const TableShape& shape = table_.shape();
  for (std::size_t i = 0; i < table_.blocks(of_stream).size(); ++i) {
    if (!any(shifts_of(shifts, table_.blocks(of_stream)[i]->cells))) {
      continue;
    }
    const std::optional<PagedBlock> shared = table_.own_pages(of_stream, i);
    if (!shared) {
      continue;
    }
    ZC_TRY(make_room_for_pages(stream));
    const PagedBlock& block = *table_.blocks(of_stream)[i];
    for (std::size_t page = 0; page < block.pages.size(); ++page) {
      const auto at = [&](const PagedBlock& of) {
        return pool_.data() + std::size_t{of.pages[page].unit} * kTileAlignment;
      };
      ZC_TRY(to_status(
          cudaMemcpy2DAsync(
              at(block), table_.layer_bytes(), at(*shared), table_.layer_bytes(),
              page_bytes(static_cast<int>(shape.head_dim), table_.classes()[block.pages[page].cls]),
              shape.n_layers, cudaMemcpyDeviceToDevice, stream),
          "pages"));
    }
    const auto copy = [&](const LayeredArray& array, std::size_t to, std::size_t from,
                          std::size_t n, std::size_t element) {
      return to_status(
          cudaMemcpy2DAsync(array.layer<std::byte>(0) + to * element, array.stride_bytes(),
                            array.layer<std::byte>(0) + from * element, array.stride_bytes(),
                            n * element, shape.n_layers, cudaMemcpyDeviceToDevice, stream),
          "pages");
    };
    const std::size_t n_sets = std::size_t{shape.n_kv_heads} * block.classes.n_key_sets;
    ZC_TRY(copy(key_sets_, block.first_set, shared->first_set, n_sets,
                2 * shape.head_dim * sizeof(HalfBits)));
    if (table_.has_wide_channels()) {
      ZC_TRY(copy(key_orders_, block.first_set, shared->first_set, n_sets, shape.head_dim));
    }
    ZC_TRY(copy(ranks_, block.first_rank, shared->first_rank,
                std::size_t{shape.n_kv_heads} * block.rank_stride(), sizeof(std::uint16_t)));
  }
  return ok_status();
}

Status DeviceCache::rotate_restored(std::uint32_t index, std::uint32_t of_stream,
                                    std::span<const std::int32_t> shifts, const RotateKeys& rope,
                                    Stream stream) {
  const auto found = restored_.find(of_stream);
  if (found == restored_.end()) {
    return ok_status();
  }
  std::vector<HalfBits>& kept = found->second[index * 2];
  std::vector<std::int32_t> positions = shifts_of(shifts, table_.restored_cells(of_stream));
  positions.resize(kept.size() / (table_.shape().n_kv_heads * table_.shape().head_dim));
  if (!any(positions)) {
    return ok_status();
  }
  const std::size_t bytes = kept.size() * sizeof(HalfBits);
  ZC_TRY(dense_.ensure(bytes, stream));
  ZC_TRY(copy_async(dense_.as<HalfBits>(), kept.data(), bytes, cudaMemcpyHostToDevice, stream));
  ZC_TRY(rotate(dense_rows(dense_.as<HalfBits>(), nullptr), positions, rope, stream));
  ZC_TRY(copy_async(kept.data(), dense_.as<HalfBits>(), bytes, cudaMemcpyDeviceToHost, stream));
  return to_status(cudaStreamSynchronize(stream), "shifting keys");
}

Status DeviceCache::rotate_keys(std::uint32_t index, std::uint32_t of_stream,
                                std::span<const std::int32_t> shifts, const RotateKeys& rope,
                                Stream stream) {
  const TableShape& shape = table_.shape();
  n_lanes_ = 1;
  ZC_TRY(rotate_restored(index, of_stream, shifts, rope, stream));
  const std::vector<std::int32_t> of_tail = shifts_of(shifts, table_.tail_cells(of_stream));
  if (any(of_tail)) {
    ZC_TRY(rotate(tail(index, of_stream), of_tail, rope, stream));
  }
  ZC_TRY(own_pages(of_stream, shifts, stream));
  const std::size_t row = std::size_t{shape.n_kv_heads} * shape.head_dim;
  for (const auto& block : table_.blocks(of_stream)) {
    const std::vector<std::int32_t> positions = shifts_of(shifts, block->cells);
    if (!any(positions)) {
      continue;
    }
    const std::size_t n = block->n_tokens;
    ZC_TRY(dense_.ensure(2 * n * row * sizeof(HalfBits), stream));
    const RowsAt rows = dense_rows(dense_.as<HalfBits>(), dense_.as<HalfBits>() + n * row);
    std::vector<std::int32_t> places(n);
    std::iota(places.begin(), places.end(), 0);
    ZC_TRY(send(iota_, places, stream));
    ZC_TRY(list_pages(index, {&block, 1}, iota_.as<std::int32_t>(), false, stream));
    ZC_TRY(unpack_listed(index, of_stream, 0, block->n_tokens, rows, stream));
    ZC_TRY(rotate(rows, positions, rope, stream));
    ZC_TRY(order_.ensure(shape.n_kv_heads * n * sizeof(std::int32_t), stream));
    ZC_TRY(order_of_ranks({.n_tokens = static_cast<int>(n),
                           .n_kv_heads = static_cast<int>(shape.n_kv_heads),
                           .kept = ranks_.layer<std::uint16_t>(index) + block->first_rank,
                           .kept_stride = block->rank_stride(),
                           .order = order_.as<std::int32_t>()},
                          stream));
    PackParams p = pack_params(index, 0, of_stream, *block, rows, listed_pages_.as<PageEntry>());
    ZC_TRY(workspace_.ensure(pack_workspace_words(p) * sizeof(std::uint32_t), stream));
    p.workspace = workspace_.as<std::uint32_t>();
    if (table_.has_wide_channels()) {
      p.query_power = power_of_queries(index, of_stream);
    }
    ZC_TRY(pack(p, stream));
  }
  return ok_status();
}

}  // namespace zipcache::cuda
