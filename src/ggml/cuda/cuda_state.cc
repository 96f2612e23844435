#include "ggml/cuda/cuda_state.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace zipcache::ggml {
namespace {

using cuda::HalfBits;

constexpr std::size_t kChunkRows = 1024;  // of what goes through host memory

std::size_t row_bytes(const CudaKvTensor& kv) { return kv.group->row * sizeof(HalfBits); }
std::size_t stream_bytes(const CudaKvTensor& kv) { return row_bytes(kv) * kv.group->n_cells; }

// The graph's work may still run on another stream.
Status wait_for_device() { return cuda::to_status(cudaDeviceSynchronize(), "waiting"); }

// visit(stream, first cell, cells, bytes before these) for the part of every stream.
template <typename Visit>
Status for_each_stream(const CudaKvTensor& kv, std::size_t offset, std::size_t size,
                       Visit&& visit) {
  const std::size_t row = row_bytes(kv);
  if (offset % row != 0 || size % row != 0) {
    return unsupported("bytes " + std::to_string(offset) + " to " + std::to_string(offset + size) +
                       " of layer " + std::to_string(kv.layer) + " are no whole rows of " +
                       std::to_string(row) + " bytes");
  }
  for (std::size_t done = 0; done < size;) {
    const std::size_t first = (offset + done) / row;
    const std::size_t cell = first % kv.group->n_cells;
    const std::size_t n = std::min((size - done) / row, kv.group->n_cells - cell);
    if (Status visited =
            visit(static_cast<std::uint32_t>(first / kv.group->n_cells),
                  static_cast<std::uint32_t>(cell), static_cast<std::uint32_t>(n), done);
        !visited) {
      return visited;
    }
    done += n * row;
  }
  return ok_status();
}

std::optional<std::uint32_t> whole_stream(const CudaKvTensor& kv, std::size_t offset,
                                          std::size_t size) {
  const std::size_t bytes = stream_bytes(kv);
  return size == bytes && offset % bytes == 0
             ? std::optional(static_cast<std::uint32_t>(offset / bytes))
             : std::nullopt;
}

}  // namespace

Status read_kv(const CudaKvTensor& kv, std::size_t offset, std::size_t size, void* out) {
  auto* const bytes = static_cast<std::byte*>(out);
  if (kv.group->cache == nullptr) {
    std::fill_n(bytes, size, std::byte{0});
    return ok_status();
  }
  if (Status ok = wait_for_device(); !ok) {
    return ok;
  }
  return for_each_stream(
      kv, offset, size,
      [&](std::uint32_t stream, std::uint32_t cell, std::uint32_t n, std::size_t done) {
        return kv.group->cache->read_rows(kv.index, kv.tensor == Tensor::kKey, stream, cell, n,
                                          reinterpret_cast<HalfBits*>(bytes + done),
                                          cudaStreamPerThread);
      });
}

Status write_kv(const CudaKvTensor& kv, std::size_t offset, std::size_t size, const void* data) {
  if (Status opened = kv.group->buffer->open_as_noted(kv.group); !opened) {
    return opened;
  }
  const auto* const bytes = static_cast<const std::byte*>(data);
  return for_each_stream(
      kv, offset, size,
      [&](std::uint32_t stream, std::uint32_t cell, std::uint32_t n, std::size_t done) {
        return kv.group->cache->write_rows(kv.index, kv.tensor == Tensor::kKey, stream, cell, n,
                                           reinterpret_cast<const HalfBits*>(bytes + done));
      });
}

Status write_kv_zeros(const CudaKvTensor& kv, std::size_t offset, std::size_t size) {
  if (kv.group->cache == nullptr) {
    return ok_status();
  }
  const std::vector<std::byte> zeros(std::min(size, kChunkRows * row_bytes(kv)));
  for (std::size_t done = 0; done < size; done += zeros.size()) {
    if (Status ok = write_kv(kv, offset + done, std::min(zeros.size(), size - done), zeros.data());
        !ok) {
      return ok;
    }
  }
  return ok_status();
}

Status copy_kv(const CudaKvTensor& from, std::size_t from_offset, const CudaKvTensor& to,
               std::size_t to_offset, std::size_t size) {
  if (from.group == to.group && from.tensor == to.tensor && from.index == to.index) {
    const auto source = whole_stream(from, from_offset, size);
    const auto target = whole_stream(to, to_offset, size);
    cuda::DeviceCache* const cache = from.group->cache.get();
    if (source && target && cache == nullptr) {
      return ok_status();  // nothing is held
    }
    if (source && target) {
      StreamCopy& last = to.group->last_copy;
      std::vector<bool>& done = to.tensor == Tensor::kKey ? last.keys : last.values;
      const bool is_known =
          last.from == *source && last.to == *target && last.version == cache->table().version();
      if (is_known && !done[to.index]) {
        done[to.index] = true;
        return ok_status();
      }
      if (Status ok = wait_for_device(); !ok) {
        return ok;
      }
      if (Status ok = cache->copy_stream(*source, *target, cudaStreamPerThread); !ok) {
        return ok;
      }
      const std::size_t n_layers = to.group->layers.size();
      last = {*source, *target, cache->table().version(), std::vector<bool>(n_layers),
              std::vector<bool>(n_layers)};
      (to.tensor == Tensor::kKey ? last.keys : last.values)[to.index] = true;
      return ok_status();
    }
  }
  std::vector<std::byte> bytes(std::min(size, kChunkRows * row_bytes(from)));
  for (std::size_t done = 0; done < size; done += bytes.size()) {
    const std::size_t part = std::min(bytes.size(), size - done);
    if (Status ok = read_kv(from, from_offset + done, part, bytes.data()); !ok) {
      return ok;
    }
    if (Status ok = write_kv(to, to_offset + done, part, bytes.data()); !ok) {
      return ok;
    }
  }
  return ok_status();
}

}  // namespace zipcache::ggml
