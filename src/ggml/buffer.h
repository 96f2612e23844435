// The buffer type of the ZipCache device. Its memory is address space that costs nothing until it
// is touched. Tensors of a KV cache keep their addresses there but never any bytes: what the host
// reads and writes through the buffer's callbacks goes to a KvStore. Every other tensor is ordinary
// memory.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/expected.h"
#include "cache/bytes.h"
#include "ggml-backend.h"
#include "ggml/kv_store.h"
#include "ggml/settings.h"

struct ggml_tensor;

namespace zipcache::ggml {

class KvBuffer;

// What a KV tensor's `extra` points to.
struct KvTensor {
  KvBuffer* buffer = nullptr;
  KvStore* store = nullptr;  // nullptr until both tensors of a layer are known
  Tensor tensor = Tensor::kKey;
  std::uint32_t layer = 0;
  std::uint32_t row = 0;
  std::uint32_t n_cells = 0;
  std::uint32_t n_streams = 0;
};

// The context of one buffer.
class KvBuffer {
 public:
  KvBuffer(std::byte* base, std::size_t size, Settings settings);
  ~KvBuffer();  // unmaps
  KvBuffer(const KvBuffer&) = delete;
  KvBuffer& operator=(const KvBuffer&) = delete;

  std::byte* base() const { return base_; }
  std::size_t size() const { return size_; }
  const Settings& settings() const { return settings_; }
  bool has_kv() const { return !tensors_.empty(); }

  // Held while a graph runs on the stores and while their bytes are read or written.
  std::mutex& mutex() { return mutex_; }

  // Makes `tensor` one of ours; its `extra` points to what we know of it.
  Status add(ggml_tensor* tensor, const KvName& name);

  // Forgets all tokens and gives touched pages back; they read as zeros again.
  void clear();

  // A write that failed outside of a graph, where the host does not ask: the next graph fails.
  void keep_error(const Error& error);
  std::optional<Error> take_error();

  cache::ByteCount bytes() const;
  // The fullest layer's tokens, all streams together.
  std::uint64_t live_tokens() const;
  // What its layers' channels were since the buffer was made; nothing unless they are observed.
  std::vector<policy::LayerCalibration> channels() const;
  // Spent on saliency and sealing since the buffer was made.
  double policy_seconds() const;
  std::size_t n_layers() const { return stores_.size(); }

 private:
  std::byte* base_;
  std::size_t size_;
  const Settings settings_;
  std::mutex mutex_;
  std::deque<KvTensor> tensors_;  // stable addresses
  std::vector<std::unique_ptr<KvStore>> stores_;
  std::optional<Error> error_;
};

// `device` is the device that the type belongs to.
ggml_backend_buffer_type_t buffer_type();
void set_buffer_type_device(ggml_backend_dev_t device);

// The KV tensor that `tensor` is, or is a view of; nullptr for any other.
KvTensor* kv_tensor(const ggml_tensor* tensor);

}  // namespace zipcache::ggml
