// The buffer type of ZipCacheCUDA: device addresses that get memory when the first tensor that is
// no KV cache is put there. Tensors of a KV cache keep their addresses and never have bytes: layers
// of one shape are a group, a DeviceCache. Under policy fp16 every tensor is ordinary memory.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/expected.h"
#include "cache/cuda/device_cache.h"
#include "ggml-backend.h"
#include "ggml/cuda/host_inputs.h"
#include "ggml/kv_store.h"
#include "ggml/settings.h"

struct ggml_tensor;

namespace zipcache::ggml {

class CudaKvBuffer;

// A copy of a stream into another, of which the host has asked by these layers so far.
struct StreamCopy {
  std::uint32_t from = 0, to = 0;
  std::uint64_t version = 0;  // of the table, after it
  std::vector<bool> keys, values;
};

// Layers that keep their tokens in step.
struct CudaGroup {
  CudaKvBuffer* buffer = nullptr;
  std::uint32_t row = 0;  // elements
  std::uint32_t n_cells = 0;
  std::uint32_t n_streams = 0;
  std::vector<std::uint32_t> layers;           // of the model, in the order of the cache
  std::uint32_t n_kv_heads = 0, head_dim = 0;  // as noted; 0: not yet
  std::unique_ptr<cuda::DeviceCache> cache;    // once they are needed
  StreamCopy last_copy;
};

// What a KV tensor's `extra` points to.
struct CudaKvTensor {
  CudaGroup* group = nullptr;
  Tensor tensor = Tensor::kKey;
  std::uint32_t layer = 0;  // of the model
  std::uint32_t index = 0;  // in the group
};

class CudaKvBuffer {
 public:
  explicit CudaKvBuffer(Settings settings) : settings_(std::move(settings)) {}
  Status reserve(std::size_t bytes) { return range_.reserve(bytes); }

  std::byte* base() const { return range_.data(); }
  std::size_t size() const { return range_.reserved_bytes(); }
  const Settings& settings() const { return settings_; }
  bool has_kv() const { return !tensors_.empty(); }
  bool has_memory() const { return range_.mapped_bytes() > 0; }
  std::mutex& mutex() { return mutex_; }

  Status give_memory() { return range_.ensure(range_.reserved_bytes()); }
  Status add(ggml_tensor* tensor, const KvName& name);
  // How rows split into heads, as the host's first plans show: rows may be restored before any
  // attention is computed.
  void note_heads(CudaGroup* group, std::uint32_t n_kv_heads, std::uint32_t head_dim);
  // The group's cache, made when it is first needed.
  Status open(CudaGroup* group, std::uint32_t n_kv_heads, std::uint32_t head_dim);
  Status open_as_noted(CudaGroup* group);
  void clear();

  // Of a read or write where the host does not ask, under the lock: the next graph fails.
  void keep_error(const Error& error);
  std::optional<Error> take_error();

  const std::deque<CudaGroup>& groups() const { return groups_; }
  HostInputs& host_inputs() { return host_inputs_; }

 private:
  cuda::AddressRange range_;
  const Settings settings_;
  std::mutex mutex_;
  std::deque<CudaKvTensor> tensors_;  // stable addresses
  std::deque<CudaGroup> groups_;
  std::optional<Error> error_;
  HostInputs host_inputs_;  // of a buffer of activations
};

// The buffer of `tensor`; nullptr for one that is not of our type.
CudaKvBuffer* cuda_buffer_of(const ggml_tensor* tensor);

// The KV tensor that `tensor` is, or is a view of; nullptr for any other.
CudaKvTensor* cuda_kv_tensor(const ggml_tensor* tensor);

}  // namespace zipcache::ggml
