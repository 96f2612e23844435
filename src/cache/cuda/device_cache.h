// DeviceCache: K and V of a group of layers in GPU memory. A PageTable says where tokens are; this
// runs the kernels. One step of the engine:
//
//   begin_step()  reads which cells come and what their rows see (of the engine's bytes, or waits
//                 for the device, once), plans the step for all layers and sends the plan
//   run_layer()   of every layer, in the engine's order: stores the new tokens, attends, and, but
//                 in decode, seals what is due. Only enqueues work
//   end_step()    seals what is due in decode, of all layers: not among their launches, so that
//                 these are the same in every step
//
// Not thread-safe. All work goes to the stream that is given.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cache/bytes.h"
#include "cache/cuda/device_memory.h"
#include "cache/cuda/page_table.h"

namespace zipcache::cuda {

// The tensors of a step that all layers share, in device memory.
struct StepTensors {
  const void* rows = nullptr;  // [n_streams * n_per_stream] int64, or int32
  bool rows_are_narrow = false;
  const HalfBits* mask = nullptr;  // see MaskSummaryParams; nullptr: all is visible
  std::int64_t mask_plane_stride = 0;
  std::int64_t mask_row_stride = 0;
  std::uint32_t first_stream = 0;
  std::uint32_t n_streams = 0;
  std::uint32_t n_per_stream = 0;
  std::uint32_t n_cells = 0;  // that the mask covers
  std::uint32_t n_heads = 0;
  bool needs_window = false;  // soft cap, sinks or ALiBi
  // Factors of the mask's bias by query head (ALiBi), host memory until begin_step() returns;
  // empty: 1.
  std::span<const float> slopes;

  // The bytes of `rows` and `mask` in host memory, until begin_step() returns; empty: not known.
  std::span<const std::byte> host_rows, host_mask;
};

// Of one layer: new keys and values [tokens, n_kv_heads, head_dim], strides in floats; queries and
// output as in PrefillParams, with a stride between streams.
struct LayerTensors {
  const float* k = nullptr;
  const float* v = nullptr;
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
  const float* q = nullptr;
  std::int64_t q_stream_stride = 0;
  std::int64_t q_query_stride = 0;
  std::int64_t q_head_stride = 0;
  float* out = nullptr;  // [n_streams, n_per_stream, n_heads, head_dim]
  float scale = 1;
  float softcap = 0;
  const float* sinks = nullptr;
};

// The engine's rotary embedding, in place: keys [n_tokens, n_kv_heads, head_dim], each at its
// position; both device memory. All work before is done, and its own when it returns.
using RotateKeys =
    std::function<Status(float* keys, const std::int32_t* positions, std::uint32_t n_tokens)>;

class DeviceCache {
 public:
  // `policy` as device_policy() returned it. Memory grows with use.
  static Expected<std::unique_ptr<DeviceCache>> create(const TableShape& shape,
                                                       const policy::Policy& policy);

  Status begin_step(const StepTensors& step, Stream stream);
  Status run_layer(std::uint32_t index, const LayerTensors& layer, Stream stream);
  Status end_step(Stream stream);

  // Whether the step may be repeated by a graph that was captured when the same number was
  // returned: the launches of the step and their arguments are the same. 0: no.
  std::uint64_t repeatable() const { return repeatable_; }

  // Between steps, when no work of theirs is pending: rows of cells [first_cell, + n_cells) of a
  // stream, [n_cells, n_kv_heads * head_dim], in host memory. Cells that hold nothing read as
  // zeros. What is written stays exact until it is sealed: in a later step of the stream, by whose
  // queries it is ranked.
  Status read_rows(std::uint32_t index, bool is_key, std::uint32_t of_stream,
                   std::uint32_t first_cell, std::uint32_t n_cells, HalfBits* out, Stream stream);
  Status write_rows(std::uint32_t index, bool is_key, std::uint32_t of_stream,
                    std::uint32_t first_cell, std::uint32_t n_cells, const HalfBits* rows);
  // `to` holds what `from` holds, in all layers. Sealed tokens are not copied but shared.
  Status copy_stream(std::uint32_t from, std::uint32_t to, Stream stream);

  // A layer's keys of a stream, each turned by the shift of its cell. [n_cells]; keys of packed
  // tokens are packed anew, in their classes.
  Status rotate_keys(std::uint32_t index, std::uint32_t of_stream,
                     std::span<const std::int32_t> shifts, const RotateKeys& rope, Stream stream);

  void clear() {
    table_.clear();
    restored_.clear();
  }
  const PageTable& table() const { return table_; }
  // As the driver counts them: all that was asked of it, scratch included.
  std::size_t device_bytes() const;
  cache::ByteCount bytes() const;

 private:
  DeviceCache(const TableShape& shape, const policy::Policy& policy) : table_(shape, policy) {}

  // Layers that are sealed together: layer first + i has lane i of the scratch, where `window` is
  // the stream's.
  struct LayerBatch {
    std::uint32_t first = 0, n = 1;
    std::size_t window = 0;

    template <typename Params>
    std::span<const Params> of(const std::array<Params, kMaxBatch>& by_lane) const {
      return std::span(by_lane).first(n);
    }
  };

  Expected<Step> read_step(const StepTensors& in, Stream stream);
  Status summarize(const StepTensors& in, Stream stream);
  Status make_room(const StepTensors& in, Stream stream);
  Status make_room_for_pages(Stream stream);
  Status make_room_for_streams(Stream stream);
  Status send_block_cells(Stream stream);
  Status upload(const StepTensors& in, Stream stream);
  Status plan_decode_launch(Stream stream);
  template <typename T>
  const T* sent(std::size_t at) const {
    return reinterpret_cast<const T*>(uploaded_.as<std::byte>() + at);
  }
  // Unsealed tokens of the n-th stream of the step into its window.
  Status gather(const LayerBatch& layers, std::size_t n, Stream stream);
  Expected<const float*> contiguous_queries(const LayerTensors& layer, Stream stream);
  Status decode_layer(std::uint32_t index, const LayerTensors& layer, Stream stream);
  Status seal_decoded(std::size_t n, Stream stream);
  Status window_layer(std::uint32_t index, const LayerTensors& layer, Stream stream);
  Status keep(const LayerBatch& layers, std::size_t n, float scale,
              std::span<const ProbeParams> queries, Stream stream);
  Status find_saliency(const LayerBatch& layers, std::size_t n, float scale,
                       std::span<const ProbeParams> queries, Stream stream);
  Status seal(const LayerBatch& layers, std::size_t n, std::size_t i, bool has_power,
              Stream stream);
  PackParams pack_params(std::uint32_t index, std::size_t lane, std::uint32_t of_stream,
                         const PagedBlock& block, const RowsAt& rows, const PageEntry* pages) const;
  Expected<bool> add_query_power(const LayerBatch& layers, const StreamStep& s,
                                 std::span<const ProbeParams> probes, Stream stream);
  float* power_of_queries(std::uint32_t index, std::uint32_t of_stream) const;
  RowsAt dense_rows(HalfBits* k, HalfBits* v) const;
  // `rows` by a token's place in block_cells(), or, of one block, in the block.
  Status list_pages(std::uint32_t index, std::span<const std::shared_ptr<PagedBlock>> blocks,
                    const std::int32_t* rows, bool by_cell, Stream stream);
  Status unpack_listed(std::uint32_t index, std::uint32_t of_stream, std::uint32_t first_row,
                       std::uint32_t end_row, const RowsAt& to, Stream stream);
  std::span<const HalfBits> restored_row(std::uint32_t of_stream, std::uint32_t index, bool is_key,
                                         std::size_t slot) const;
  Status take_restored(std::uint32_t index, std::size_t n, Stream stream);
  Status own_pages(std::uint32_t of_stream, std::span<const std::int32_t> shifts, Stream stream);
  Status rotate(const RowsAt& rows, const std::vector<std::int32_t>& positions,
                const RotateKeys& rope, Stream stream);
  Status rotate_restored(std::uint32_t index, std::uint32_t of_stream,
                         std::span<const std::int32_t> shifts, const RotateKeys& rope,
                         Stream stream);
  std::uint64_t launch_key() const;
  RowsAt tail(std::uint32_t index, std::uint32_t stream) const;
  RowsAt window(std::size_t lane, std::size_t s) const;
  template <typename T>
  T* of_lane(const DeviceArray& scratch, std::size_t lane) const {
    const std::size_t bytes = scratch.bytes() / n_lanes_ / 256 * 256;
    return reinterpret_cast<T*>(scratch.as<std::byte>() + lane * bytes);
  }
  const std::uint8_t* pool(std::uint32_t index) const;

  // Where the arrays of a stream's step are in uploaded_, in bytes.
  struct Uploaded {
    std::size_t gather_from = 0, gather_to = 0, window_cells = 0, probe_rows = 0,
                probe_positions = 0, keep_from = 0, keep_to = 0, pages = 0, sources = 0,
                row_begin = 0;
    std::uint32_t n_pages = 0, n_probes = 0;
    std::vector<std::size_t> seal_pages;
  };

  PageTable table_;
  std::uint32_t n_heads_ = 0;
  Step step_;
  StepTensors in_;
  std::uint64_t repeatable_ = 0;
  float scale_ = 1;  // of the layers' scores

  // The cache.
  AddressRange pool_;
  LayeredArray key_sets_, key_orders_, query_power_, ranks_, value_factors_, tail_k_, tail_v_,
      ring_q_, ring_lse_, last_lse_;
  DeviceArray block_cells_;
  std::uint64_t cells_version_ = 0;

  // A step's. Layers that are sealed together have scratch of their own: window_, saliency_, order_
  // and workspace_ are there once per lane, so many bytes apart.
  std::size_t window_tokens_ = 0, n_windows_ = 1, n_lanes_ = 1;  // of a window; of a lane; of all
  DeviceArray summary_, uploaded_, window_, queries_, lse_, probe_q_, probe_lse_, saliency_, order_,
      workspace_, page_cells_, partials_, prefill_tickets_, prefill_partials_;
  PinnedArray summary_host_, upload_host_;
  // Of the step's new tokens and of what their rows see, on the host; see StepInput.
  std::vector<std::int64_t> rows_;
  std::vector<std::uint8_t> flags_;
  std::vector<std::int32_t> row_counts_;
  std::vector<std::byte> upload_bytes_;
  std::size_t place_ = 0, ring_at_ = 0, tail_counts_ = 0, zeros_ = 0, slopes_ = 0;
  bool has_slopes_ = false;
  std::vector<Uploaded> at_;

  // Restored rows by stream: of every layer keys and values, [slots, n_kv_heads * head_dim].
  std::map<std::uint32_t, std::vector<std::vector<HalfBits>>> restored_;
  // Between steps.
  DeviceArray dense_, listed_pages_, listed_sources_, moved_from_, moved_to_, floats_, iota_;
  int n_listed_ = 0;

  // The decode launch.
  std::optional<DecodeSetup> decode_setup_;
  std::vector<std::uint64_t> planned_for_;  // serials of its blocks, stream by stream
  DeviceArray plan_items_, plan_pages_, tickets_;
  std::int32_t n_blocks_ = 0, cluster_blocks_ = 1;
  int prefill_blocks_ = 0;
};

}  // namespace zipcache::cuda
