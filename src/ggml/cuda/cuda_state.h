// Bytes of a KV tensor, as the host saves, restores and copies sequences: rows of f16, whatever
// they are packed as. Whole rows only. The caller holds the buffer's lock and no graph runs.
#pragma once

#include <cstddef>

#include "base/expected.h"
#include "ggml/cuda/cuda_buffer.h"

namespace zipcache::ggml {

// Bytes [offset, offset + size) of the tensor itself, not of a view.
Status read_kv(const CudaKvTensor& kv, std::size_t offset, std::size_t size, void* out);
Status write_kv(const CudaKvTensor& kv, std::size_t offset, std::size_t size, const void* data);
Status write_kv_zeros(const CudaKvTensor& kv, std::size_t offset, std::size_t size);

// From one KV tensor to another. The host copies a stream tensor by tensor; the first of these
// calls copies all layers and the others find it done.
Status copy_kv(const CudaKvTensor& from, std::size_t from_offset, const CudaKvTensor& to,
               std::size_t to_offset, std::size_t size);

}  // namespace zipcache::ggml
