// KvStore: the keys and values of one model layer as the host engine knows them, two tensors
// cache_k_l<layer> and cache_v_l<layer> of fp16 [n_streams, n_cells, row]. A stream is one
// LayerCache. The host reads and writes bytes at any offset of the tensors, as if they were plain
// memory; offsets are turned into streams, cells and rows here and nowhere else.
//
// Knows nothing of ggml. Not thread-safe; the buffer that owns it holds a lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "base/expected.h"
#include "cache/bytes.h"
#include "cache/layer_cache.h"
#include "ggml/channel_observer.h"
#include "policy/policy.h"

namespace zipcache::ggml {

using cache::Tensor;

// "cache_k_l12" -> keys of layer 12, "cache_v_l3" -> values of layer 3; any other name: nothing.
struct KvName {
  Tensor tensor = Tensor::kKey;
  std::uint32_t layer = 0;
};
std::optional<KvName> parse_kv_name(std::string_view name);

class KvStore {
 public:
  struct Shape {
    std::uint32_t layer = 0;
    std::uint32_t n_streams = 0;
    std::uint32_t n_cells = 0;  // per stream
    std::uint32_t key_row = 0;  // elements of a row
    std::uint32_t value_row = 0;
  };

  KvStore(const Shape& shape, const std::shared_ptr<const policy::Policy>& policy,
          const std::shared_ptr<cache::Budget>& budget);

  const Shape& shape() const { return shape_; }
  std::size_t row_bytes(Tensor tensor) const;
  std::size_t tensor_bytes(Tensor tensor) const;
  cache::LayerCache& stream(std::uint32_t index) { return *streams_[index]; }
  const cache::LayerCache& stream(std::uint32_t index) const { return *streams_[index]; }

  // Bytes [offset, offset + size) of a tensor. Cells never written read as zeros.
  void read(Tensor tensor, std::size_t offset, std::size_t size, void* out) const;
  // A row that is written in part keeps its other elements.
  Status write(Tensor tensor, std::size_t offset, std::size_t size, const void* data);
  Status write_zeros(Tensor tensor, std::size_t offset, std::size_t size);

  // New tokens: rows.data[i] becomes row global_rows[i] = stream * n_cells + cell. `writer` names
  // who did it, for written_by().
  Status put(Tensor tensor, std::span<const std::int64_t> global_rows, const cache::RowsView& rows,
             std::uint64_t writer);
  // True when the newest keys of a stream were put() by `writer`.
  bool written_by(std::uint32_t stream, std::uint64_t writer) const {
    return writers_[stream] == writer;
  }

  // Copies bytes of another store's tensor (or of this one's). A whole stream of keys takes the
  // stream's values along, packed as they are: the host copies both, keys first.
  Status copy(Tensor tensor, std::size_t offset, std::size_t size, const KvStore& from,
              std::size_t from_offset);

  // Keeps what clear() does not forget: the extremes of all channels from now on.
  void observe();
  ChannelObserver* observer() { return observer_.get(); }  // nullptr before
  const ChannelObserver* observer() const { return observer_.get(); }

  void clear();
  cache::ByteCount bytes() const;
  // Cells in use, all streams together.
  std::uint64_t live_tokens() const;
  // Spent on saliency and sealing so far.
  double policy_seconds() const;

 private:
  // Calls visit(stream, cell, byte in row, bytes) for each run of whole rows, and for each part of
  // a row, of [offset, offset + size).
  template <typename Visit>
  Status for_each_run(Tensor tensor, std::size_t offset, std::size_t size, Visit&& visit) const;
  Status write_rows(Tensor tensor, std::uint32_t stream, std::uint32_t first_cell,
                    std::span<const Half> rows);
  std::optional<std::uint32_t> whole_stream(Tensor tensor, std::size_t offset,
                                            std::size_t size) const;
  void forget_writer(std::uint32_t stream);

  Shape shape_;
  std::unique_ptr<ChannelObserver> observer_;
  std::vector<std::unique_ptr<cache::LayerCache>> streams_;
  std::vector<std::uint64_t> writers_;                 // per stream, 0 = nobody
  std::vector<std::uint32_t> put_cells_;               // of put(), kept for its memory
  std::vector<const cache::LayerCache*> copied_from_;  // per stream: values came with the keys
};

}  // namespace zipcache::ggml
