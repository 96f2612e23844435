#include "ggml/kv_store.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>

namespace zipcache::ggml {
namespace {

// Rows moved through one scratch buffer: large enough to amortize a call, small beside the cache.
constexpr std::uint32_t kChunkRows = 64;

bool is_zero(std::span<const Half> row) {
  return std::all_of(row.begin(), row.end(), [](Half element) { return element == 0; });
}

}  // namespace

std::optional<KvName> parse_kv_name(std::string_view name) {
  constexpr std::string_view kKeys = "cache_k_l", kValues = "cache_v_l";
  KvName parsed;
  if (name.starts_with(kKeys)) {
    parsed.tensor = Tensor::kKey;
  } else if (name.starts_with(kValues)) {
    parsed.tensor = Tensor::kValue;
  } else {
    return std::nullopt;
  }
  name.remove_prefix(kKeys.size());
  const char* end = name.data() + name.size();
  const auto [stop, code] = std::from_chars(name.data(), end, parsed.layer);
  if (code != std::errc{} || stop != end) {
    return std::nullopt;  // a view of one: "cache_k_l3 (view)"
  }
  return parsed;
}

KvStore::KvStore(const Shape& shape, const std::shared_ptr<const policy::Policy>& policy,
                 const std::shared_ptr<cache::Budget>& budget)
    : shape_(shape), writers_(shape.n_streams, 0), copied_from_(shape.n_streams, nullptr) {
  const cache::LayerCache::Shape stream_shape{.layer = shape.layer,
                                              .n_cells = shape.n_cells,
                                              .key_row = shape.key_row,
                                              .value_row = shape.value_row};
  for (std::uint32_t stream = 0; stream < shape.n_streams; ++stream) {
    streams_.push_back(std::make_unique<cache::LayerCache>(stream_shape, policy, budget));
  }
}

std::size_t KvStore::row_bytes(Tensor tensor) const {
  return (tensor == Tensor::kKey ? shape_.key_row : shape_.value_row) * sizeof(Half);
}

std::size_t KvStore::tensor_bytes(Tensor tensor) const {
  return row_bytes(tensor) * shape_.n_cells * shape_.n_streams;
}

template <typename Visit>
Status KvStore::for_each_run(Tensor tensor, std::size_t offset, std::size_t size,
                             Visit&& visit) const {
  ZC_CHECK(offset <= tensor_bytes(tensor) && size <= tensor_bytes(tensor) - offset);
  const std::size_t row = row_bytes(tensor);
  while (size > 0) {
    const std::size_t global_row = offset / row;
    const auto stream = static_cast<std::uint32_t>(global_row / shape_.n_cells);
    const auto cell = static_cast<std::uint32_t>(global_row % shape_.n_cells);
    const std::size_t in_row = offset % row;
    std::size_t bytes = std::min(size, row - in_row);
    if (in_row == 0 && size >= row) {
      const std::size_t rows =
          std::min({size / row, std::size_t{shape_.n_cells - cell}, std::size_t{kChunkRows}});
      bytes = rows * row;
    }
    if (Status done = visit(stream, cell, in_row, bytes); !done) {
      return done;
    }
    offset += bytes;
    size -= bytes;
  }
  return ok_status();
}

void KvStore::read(Tensor tensor, std::size_t offset, std::size_t size, void* out) const {
  const std::size_t row = row_bytes(tensor);
  std::vector<Half> rows;
  auto* to = static_cast<std::byte*>(out);
  const Status done = for_each_run(
      tensor, offset, size,
      [&](std::uint32_t stream, std::uint32_t cell, std::size_t in_row, std::size_t bytes) {
        const auto n = static_cast<std::uint32_t>(std::max<std::size_t>(1, bytes / row));
        rows.resize(n * row / sizeof(Half));
        streams_[stream]->get(tensor, cell, n, rows.data());
        std::memcpy(to, reinterpret_cast<const std::byte*>(rows.data()) + in_row, bytes);
        to += bytes;
        return ok_status();
      });
  ZC_CHECK(done);
}

Status KvStore::write(Tensor tensor, std::size_t offset, std::size_t size, const void* data) {
  const std::size_t row = row_bytes(tensor);
  std::vector<Half> rows;
  const auto* from = static_cast<const std::byte*>(data);
  return for_each_run(
      tensor, offset, size,
      [&](std::uint32_t stream, std::uint32_t cell, std::size_t in_row, std::size_t bytes) {
        const auto n = static_cast<std::uint32_t>(std::max<std::size_t>(1, bytes / row));
        rows.resize(n * row / sizeof(Half));
        if (bytes < row) {
          streams_[stream]->get(tensor, cell, 1, rows.data());
        }
        std::memcpy(reinterpret_cast<std::byte*>(rows.data()) + in_row, from, bytes);
        from += bytes;
        return write_rows(tensor, stream, cell, rows);
      });
}

Status KvStore::write_zeros(Tensor tensor, std::size_t offset, std::size_t size) {
  const std::vector<std::byte> zeros(std::min(size, kChunkRows * row_bytes(tensor)));
  for (std::size_t done = 0; done < size; done += zeros.size()) {
    const std::size_t bytes = std::min(zeros.size(), size - done);
    if (Status written = write(tensor, offset + done, bytes, zeros.data()); !written) {
      return written;
    }
  }
  return ok_status();
}

// Zeros over zeros are dropped, so that whole streams can be restored or cleared through write()
// without cells coming to life that hold nothing.
Status KvStore::write_rows(Tensor tensor, std::uint32_t stream, std::uint32_t first_cell,
                           std::span<const Half> rows) {
  const std::size_t row = row_bytes(tensor) / sizeof(Half);
  const auto n = static_cast<std::uint32_t>(rows.size() / row);
  cache::LayerCache& cache = *streams_[stream];
  forget_writer(stream);

  std::vector<Half> old(row);
  std::vector<std::uint32_t> cells;
  std::uint32_t first = 0;  // of the run of rows gathered in `cells`
  const auto put_run = [&]() -> Status {
    if (cells.empty()) {
      return ok_status();
    }
    const cache::RowsView view{rows.data() + first * row, row * sizeof(Half), /*is_half=*/true};
    Status done = cache.put(tensor, cells, view);
    cells.clear();
    return done;
  };
  for (std::uint32_t i = 0; i < n; ++i) {
    bool needed = true;
    if (is_zero(rows.subspan(i * row, row))) {
      cache.get(tensor, first_cell + i, 1, old.data());
      needed = !is_zero(old);
    }
    if (!needed) {
      if (Status done = put_run(); !done) {
        return done;
      }
      continue;
    }
    if (cells.empty()) {
      first = i;
    }
    cells.push_back(first_cell + i);
  }
  return put_run();
}

Status KvStore::put(Tensor tensor, std::span<const std::int64_t> global_rows,
                    const cache::RowsView& rows, std::uint64_t writer) {
  std::vector<std::uint32_t>& cells = put_cells_;
  cells.clear();
  for (std::size_t first = 0; first < global_rows.size(); first += cells.size()) {
    cells.clear();
    const auto stream_of = [&](std::size_t i) { return global_rows[i] / shape_.n_cells; };
    const std::int64_t stream = stream_of(first);
    for (std::size_t i = first; i < global_rows.size(); ++i) {
      if (global_rows[i] < 0 || stream_of(i) >= shape_.n_streams) {
        return invalid_argument("row " + std::to_string(global_rows[i]) + " of layer " +
                                std::to_string(shape_.layer) + " lies outside the KV cache");
      }
      if (stream_of(i) != stream) {
        break;
      }
      cells.push_back(static_cast<std::uint32_t>(global_rows[i] % shape_.n_cells));
    }
    const cache::RowsView part{static_cast<const std::byte*>(rows.data) + first * rows.stride_bytes,
                               rows.stride_bytes, rows.is_half};
    forget_writer(static_cast<std::uint32_t>(stream));
    if (Status done = streams_[stream]->put(tensor, cells, part); !done) {
      return done;
    }
    if (observer_ != nullptr) {
      observer_->add_rows(tensor, cells.size(), part);
    }
    writers_[stream] = writer;
  }
  return ok_status();
}

Status KvStore::copy(Tensor tensor, std::size_t offset, std::size_t size, const KvStore& from,
                     std::size_t from_offset) {
  const auto to_stream = whole_stream(tensor, offset, size);
  const auto from_stream = from.whole_stream(tensor, from_offset, size);
  if (to_stream && from_stream) {
    const cache::LayerCache* source = from.streams_[*from_stream].get();
    if (tensor == Tensor::kValue && copied_from_[*to_stream] == source) {
      copied_from_[*to_stream] = nullptr;
      return ok_status();
    }
    if (tensor == Tensor::kKey) {
      forget_writer(*to_stream);
      Status done = streams_[*to_stream]->copy_from(*source);
      copied_from_[*to_stream] = done ? source : nullptr;
      return done;
    }
  }
  std::vector<std::byte> bytes(std::min(size, kChunkRows * row_bytes(tensor)));
  for (std::size_t done = 0; done < size; done += bytes.size()) {
    const std::size_t part = std::min(bytes.size(), size - done);
    from.read(tensor, from_offset + done, part, bytes.data());
    if (Status written = write(tensor, offset + done, part, bytes.data()); !written) {
      return written;
    }
  }
  return ok_status();
}

std::optional<std::uint32_t> KvStore::whole_stream(Tensor tensor, std::size_t offset,
                                                   std::size_t size) const {
  const std::size_t stream_bytes = row_bytes(tensor) * shape_.n_cells;
  if (size != stream_bytes || offset % stream_bytes != 0) {
    return std::nullopt;
  }
  return static_cast<std::uint32_t>(offset / stream_bytes);
}

void KvStore::forget_writer(std::uint32_t stream) {
  writers_[stream] = 0;
  copied_from_[stream] = nullptr;
}

void KvStore::observe() {
  observer_ = std::make_unique<ChannelObserver>(shape_.layer, shape_.key_row, shape_.value_row);
}

void KvStore::clear() {
  for (std::uint32_t stream = 0; stream < shape_.n_streams; ++stream) {
    streams_[stream]->clear();
    forget_writer(stream);
  }
}

cache::ByteCount KvStore::bytes() const {
  cache::ByteCount sum;
  for (const auto& stream : streams_) {
    sum += stream->bytes();
  }
  return sum;
}

std::uint64_t KvStore::live_tokens() const { return bytes().live_tokens; }

double KvStore::policy_seconds() const {
  std::chrono::duration<double> sum{0};
  for (const auto& stream : streams_) {
    sum += stream->policy_time();
  }
  return sum.count();
}

}  // namespace zipcache::ggml
