#include "ggml/cuda/cuda_buffer.h"

#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/cuda/cuda_registry.h"
#include "ggml/cuda/cuda_state.h"
#include "ggml/guards.h"
#include "ggml/log.h"
#include "ggml/report.h"
#include "ggml/tables.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

// Copies of the host's own CUDA buffers work like this, too: ordered by synchronize(), not by
// stream.
void finish(cudaError_t started, const char* what) {
  const cudaError_t error =
      started != cudaSuccess ? started : cudaStreamSynchronize(cudaStreamPerThread);
  if (error != cudaSuccess) {
    log_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

std::string report_line(const CudaKvBuffer& buffer, bool as_json) {
  cache::ByteCount bytes;
  std::size_t n_layers = 0, on_device = 0;
  std::uint64_t tokens = 0;
  for (const CudaGroup& group : buffer.groups()) {
    if (group.cache != nullptr) {
      bytes += group.cache->bytes();
      on_device += group.cache->device_bytes();
      tokens = std::max(tokens, group.cache->table().live_tokens());
      n_layers += group.layers.size();
    }
  }
  if (as_json) {
    const nlohmann::ordered_json json = {{"policy", policy::describe(*buffer.settings().policy)},
                                         {"device", kCudaDeviceName},
                                         {"bytes", bytes_json(bytes)},
                                         {"device_bytes", on_device},
                                         {"fp16_bytes", bytes.fp16},
                                         {"ratio", bytes.ratio()},
                                         {"bits_per_element", bytes.bits_per_element()},
                                         {"live_tokens", tokens},
                                         {"version", ZIPCACHE_VERSION}};
    return json.dump() + "\n";
  }
  const auto mib = [](std::size_t n) { return double(n) / (1 << 20); };
  return fmt::format(
      "zipcache: {} tokens x {} layers hold {:.2f} MiB on CUDA, as fp16 {:.2f} MiB: ratio {:.2f}, "
      "{:.2f} bits per element\n"
      "zipcache:   pages {:.2f} + params {:.2f} + ranks {:.2f} + staging {:.2f} + scratch {:.2f} "
      "MiB; {}\n",
      tokens, n_layers, mib(bytes.total()), mib(bytes.fp16), bytes.ratio(),
      bytes.bits_per_element(), mib(bytes.codes), mib(bytes.params), mib(bytes.masks),
      mib(bytes.staging), mib(bytes.slack), policy::describe(*buffer.settings().policy));
}

void report(const CudaKvBuffer& buffer) {
  const std::string& to = buffer.settings().report;
  const bool empty = std::none_of(
      buffer.groups().begin(), buffer.groups().end(),
      [](const auto& g) { return g.cache != nullptr && g.cache->table().live_tokens() > 0; });
  if (empty || to == "0") {
    return;
  }
  if (to == "stderr") {
    std::fputs(report_line(buffer, false).c_str(), stderr);
    return;
  }
  std::ofstream file(to);
  file << report_line(buffer, true);
  if (!file.flush()) {
    log_error("can't write the report to " + to);
  }
}

struct Memory {
  using Buffer = CudaKvBuffer;
  using Kv = CudaKvTensor;
  static const CudaKvTensor* kv(const ggml_tensor* tensor) { return cuda_kv_tensor(tensor); }
  static CudaKvBuffer* buffer_of(const CudaKvTensor& kv) { return kv.group->buffer; }
  static constexpr auto read = read_kv;
  static constexpr auto write = write_kv;
  static constexpr auto write_zeros = write_kv_zeros;
  static constexpr auto copy = copy_kv;

  static void fill(CudaKvBuffer* buffer, void* to, int value, std::size_t size) {
    buffer->host_inputs().written(to, size);
    finish(cudaMemsetAsync(to, value, size, cudaStreamPerThread), "memset");
  }
  static void set(CudaKvBuffer* buffer, void* to, const void* from, std::size_t size) {
    buffer->host_inputs().written(to, from, size);
    finish(cudaMemcpyAsync(to, from, size, cudaMemcpyHostToDevice, cudaStreamPerThread),
           "copy to the device");
  }
  static void get(void* to, const void* from, std::size_t size) {
    finish(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToHost, cudaStreamPerThread),
           "copy from the device");
  }
  static void move(CudaKvBuffer* buffer, void* to, const void* from, std::size_t size) {
    buffer->host_inputs().written(to, size);
    finish(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, cudaStreamPerThread),
           "copy on the device");
  }

  static void close(CudaKvBuffer* buffer) { report(*buffer); }
  static ggml_status init(ggml_backend_buffer_t buffer, ggml_tensor* tensor);
  static void clear(CudaKvBuffer* buffer, std::uint8_t value) {
    const std::lock_guard lock(buffer->mutex());
    buffer->clear();
    buffer->host_inputs().forget();
    if (buffer->has_memory()) {
      cudaDeviceSynchronize();
      finish(cudaMemsetAsync(buffer->base(), value, buffer->size(), cudaStreamPerThread), "clear");
    }
  }
};
using Table = BufferTable<Memory>;

// Called for every tensor and view of every graph, so most calls must leave at the first lines.
ggml_status Memory::init(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  if (tensor->view_src != nullptr) {
    return GGML_STATUS_SUCCESS;
  }
  CudaKvBuffer* context = Table::of(buffer);
  const Status done = guarded([&] {
    const auto name =
        takes_over() && tensor->op == GGML_OP_NONE ? parse_kv_name(tensor->name) : std::nullopt;
    return name                    ? context->add(tensor, *name)
           : context->has_memory() ? ok_status()
                                   : context->give_memory();
  });
  if (!done) {
    return failed(done.error());
  }
  // Matrix kernels read whole blocks of 512 elements of quantized rows: what follows must be zeros.
  if (ggml_is_quantized(tensor->type) && buffer->usage != GGML_BACKEND_BUFFER_USAGE_COMPUTE) {
    const std::size_t used = ggml_nbytes(tensor);
    const std::size_t padded = ggml_backend_buft_get_alloc_size(buffer->buft, tensor);
    if (padded > used) {
      finish(cudaMemsetAsync(static_cast<std::byte*>(tensor->data) + used, 0, padded - used,
                             cudaStreamPerThread),
             "padding");
    }
  }
  return GGML_STATUS_SUCCESS;
}

ggml_backend_buffer_type_t inner_type() { return ggml_backend_dev_buffer_type(inner_device()); }

const char* get_name(ggml_backend_buffer_type_t /*type*/) { return kCudaDeviceName; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, std::size_t size) {
  try {
    auto context = std::make_unique<CudaKvBuffer>(cuda_settings());
    if (Status ok = context->reserve(size); !ok) {
      log_error(ok.error().message);
      return nullptr;
    }
    return ggml_backend_buffer_init(type, Table::interface(), context.release(), size);
  } catch (const std::exception& error) {
    log_error(error.what());
    return nullptr;
  }
}

std::size_t get_alignment(ggml_backend_buffer_type_t /*type*/) {
  return ggml_backend_buft_get_alignment(inner_type());
}

// The host's kernels want room behind quantized rows, and beside attention, which is ours.
std::size_t get_alloc_size(ggml_backend_buffer_type_t /*type*/, const ggml_tensor* tensor) {
  return takes_over() && tensor->op == GGML_OP_FLASH_ATTN_EXT
             ? ggml_nbytes(tensor)
             : ggml_backend_buft_get_alloc_size(inner_type(), tensor);
}

bool is_host(ggml_backend_buffer_type_t /*type*/) { return false; }

ggml_backend_buffer_type the_type = {
    .iface =
        {
            .get_name = get_name,
            .alloc_buffer = alloc_buffer,
            .get_alignment = get_alignment,
            .get_max_size = nullptr,
            .get_alloc_size = get_alloc_size,
            .is_host = is_host,
        },
    .device = nullptr,
    .context = nullptr,
};

}  // namespace

Status CudaKvBuffer::add(ggml_tensor* tensor, const KvName& name) {
  if (tensor->type != GGML_TYPE_F16) {
    return unsupported(std::string("a KV cache of type ") + ggml_type_name(tensor->type) +
                       " is not served, ZipCache compresses f16 itself: drop -ctk and -ctv");
  }
  const auto narrow = [](std::int64_t n) { return static_cast<std::uint32_t>(n); };
  const std::lock_guard lock(mutex_);
  auto group = std::find_if(groups_.begin(), groups_.end(), [&](const CudaGroup& g) {
    return g.row == narrow(tensor->ne[0]) && g.n_cells == narrow(tensor->ne[1]) &&
           g.n_streams == narrow(tensor->ne[2]);
  });
  if (group == groups_.end()) {
    CudaGroup& added = groups_.emplace_back();
    added.buffer = this;
    added.row = narrow(tensor->ne[0]);
    added.n_cells = narrow(tensor->ne[1]);
    added.n_streams = narrow(tensor->ne[2]);
    group = std::prev(groups_.end());
  }
  auto layer = std::find(group->layers.begin(), group->layers.end(), name.layer);
  if (layer == group->layers.end()) {
    layer = group->layers.insert(layer, name.layer);
  }
  tensors_.push_back({&*group, name.tensor, name.layer,
                      static_cast<std::uint32_t>(layer - group->layers.begin())});
  tensor->extra = &tensors_.back();
  return ok_status();
}

Status CudaKvBuffer::open(CudaGroup* group, std::uint32_t n_kv_heads, std::uint32_t head_dim) {
  if (group->cache != nullptr) {
    const cuda::TableShape& shape = group->cache->table().shape();
    if (shape.n_kv_heads != n_kv_heads || shape.head_dim != head_dim) {
      return unsupported(
          "layers of one row length split into different heads, which is not served "
          "on CUDA; use -dev ZipCache");
    }
    return ok_status();
  }
  Expected<std::unique_ptr<cuda::DeviceCache>> made =
      cuda::DeviceCache::create({.n_layers = static_cast<std::uint32_t>(group->layers.size()),
                                 .n_streams = group->n_streams,
                                 .n_cells = group->n_cells,
                                 .n_kv_heads = n_kv_heads,
                                 .head_dim = head_dim,
                                 .layer = group->layers.front()},
                                *settings_.policy);
  if (!made) {
    return made.error();
  }
  group->cache = std::move(*made);
  return ok_status();
}

void CudaKvBuffer::note_heads(CudaGroup* group, std::uint32_t n_kv_heads, std::uint32_t head_dim) {
  const std::lock_guard lock(mutex_);
  group->n_kv_heads = n_kv_heads;
  group->head_dim = head_dim;
}

Status CudaKvBuffer::open_as_noted(CudaGroup* group) {
  if (group->cache != nullptr) {
    return ok_status();
  }
  return group->n_kv_heads > 0
             ? open(group, group->n_kv_heads, group->head_dim)
             : unsupported("rows come before it is known how they split into heads");
}

void CudaKvBuffer::clear() {
  for (CudaGroup& group : groups_) {
    if (group.cache != nullptr) {
      group.cache->clear();
    }
  }
  error_.reset();
}

void CudaKvBuffer::keep_error(const Error& error) {
  if (!error_) {
    error_ = error;
  }
}

std::optional<Error> CudaKvBuffer::take_error() { return std::exchange(error_, std::nullopt); }

ggml_backend_buffer_type_t cuda_buffer_type() { return &the_type; }

void set_cuda_buffer_type_device(ggml_backend_dev_t device) { the_type.device = device; }

CudaKvBuffer* cuda_buffer_of(const ggml_tensor* tensor) {
  const ggml_backend_buffer_t buffer = base_of(tensor)->buffer;
  return buffer != nullptr && buffer->buft == cuda_buffer_type() ? Table::of(buffer) : nullptr;
}

CudaKvTensor* cuda_kv_tensor(const ggml_tensor* tensor) {
  return takes_over() && is_kv(tensor, cuda_buffer_type())
             ? static_cast<CudaKvTensor*>(base_of(tensor)->extra)
             : nullptr;
}

}  // namespace zipcache::ggml
