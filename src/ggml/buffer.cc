#include "ggml/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <utility>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/log.h"
#include "ggml/registry.h"
#include "ggml/report.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

constexpr std::size_t kAlignment = 64;

KvBuffer* context_of(ggml_backend_buffer_t buffer) {
  return static_cast<KvBuffer*>(buffer->context);
}

// Runs `work` so that nothing is thrown into the host.
template <typename Work>
Status guarded(Work&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return out_of_memory("no memory left");
  } catch (const std::exception& error) {
    return invalid_argument(error.what());
  }
}

// For callbacks by which the host can't be told: a line now, and the next graph fails.
void must_succeed(KvBuffer* buffer, const char* what, const Status& done) {
  if (!done) {
    log_error(std::string(what) + ": " + done.error().message);
    buffer->keep_error(done.error());
  }
}

// Where byte `offset` of a KV tensor's view lies in the tensor itself.
std::size_t offset_in_base(const ggml_tensor* tensor, std::size_t offset) {
  return (tensor->view_src != nullptr ? tensor->view_offs : 0) + offset;
}

void free_buffer(ggml_backend_buffer_t buffer) {
  KvBuffer* context = context_of(buffer);
  if (context->has_kv()) {
    const Status reported = guarded([&] {
      report_closed(context);
      return ok_status();
    });
    if (!reported) {
      log_error(reported.error().message);
    }
  }
  delete context;
}

void* get_base(ggml_backend_buffer_t buffer) { return context_of(buffer)->base(); }

// Called for every tensor and view of every graph, so most calls must leave at the first line.
ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  if (tensor->view_src != nullptr || tensor->op != GGML_OP_NONE) {
    return GGML_STATUS_SUCCESS;
  }
  const auto name = parse_kv_name(tensor->name);
  if (!name) {
    return GGML_STATUS_SUCCESS;
  }
  KvBuffer* context = context_of(buffer);
  const bool first = !context->has_kv();
  const Status added = guarded([&] { return context->add(tensor, *name); });
  if (!added) {
    log_error(added.error().message);
    return added.error().code == ErrorCode::kOutOfMemory ? GGML_STATUS_ALLOC_FAILED
                                                         : GGML_STATUS_FAILED;
  }
  if (first) {
    report_opened(context);
  }
  return GGML_STATUS_SUCCESS;
}

// Runs `access` on the store of a KV tensor under its buffer's lock.
template <typename Access>
void with_store(const KvTensor* kv, const char* what, Access&& access) {
  const std::lock_guard lock(kv->buffer->mutex());
  must_succeed(
      kv->buffer, what, guarded([&]() -> Status {
        if (kv->store == nullptr) {
          return unsupported("layer " + std::to_string(kv->layer) + " has keys without values");
        }
        return access(*kv->store);
      }));
}

void memset_tensor(ggml_backend_buffer_t /*buffer*/, ggml_tensor* tensor, std::uint8_t value,
                   std::size_t offset, std::size_t size) {
  const KvTensor* kv = kv_tensor(tensor);
  if (kv == nullptr) {
    std::memset(static_cast<std::byte*>(tensor->data) + offset, value, size);
    return;
  }
  with_store(kv, "filling the KV cache", [&](KvStore& store) -> Status {
    if (value != 0) {
      return unsupported("only zeros may fill it");
    }
    return store.write_zeros(kv->tensor, offset_in_base(tensor, offset), size);
  });
}

void set_tensor(ggml_backend_buffer_t /*buffer*/, ggml_tensor* tensor, const void* data,
                std::size_t offset, std::size_t size) {
  const KvTensor* kv = kv_tensor(tensor);
  if (kv == nullptr) {
    std::memcpy(static_cast<std::byte*>(tensor->data) + offset, data, size);
    return;
  }
  with_store(kv, "writing to the KV cache", [&](KvStore& store) {
    return store.write(kv->tensor, offset_in_base(tensor, offset), size, data);
  });
}

void get_tensor(ggml_backend_buffer_t /*buffer*/, const ggml_tensor* tensor, void* data,
                std::size_t offset, std::size_t size) {
  const KvTensor* kv = kv_tensor(tensor);
  if (kv == nullptr) {
    std::memcpy(data, static_cast<const std::byte*>(tensor->data) + offset, size);
    return;
  }
  if (kv->store == nullptr) {
    std::memset(data, 0, size);
  }
  with_store(kv, "reading the KV cache", [&](KvStore& store) {
    store.read(kv->tensor, offset_in_base(tensor, offset), size, data);
    return ok_status();
  });
}

void copy_within_stores(const KvTensor* from, const ggml_tensor* source, const KvTensor* to,
                        ggml_tensor* target) {
  std::unique_lock lock_to(to->buffer->mutex(), std::defer_lock);
  std::unique_lock lock_from(from->buffer->mutex(), std::defer_lock);
  if (to->buffer == from->buffer) {
    lock_to.lock();
  } else {
    std::lock(lock_to, lock_from);
  }
  must_succeed(to->buffer, "copying the KV cache", guarded([&]() -> Status {
                 if (to->store == nullptr || from->store == nullptr) {
                   return unsupported("keys without values");
                 }
                 return to->store->copy(to->tensor, offset_in_base(target, 0), ggml_nbytes(target),
                                        *from->store, offset_in_base(source, 0));
               }));
}

// False: the host copies by way of memory of its own.
bool copy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor* source, ggml_tensor* target) {
  const ggml_backend_buffer_t source_buffer = base_of(source)->buffer;
  if (source_buffer == nullptr || source_buffer->buft != buffer->buft) {
    return false;
  }
  const KvTensor* from = kv_tensor(source);
  const KvTensor* to = kv_tensor(target);
  const std::size_t bytes = ggml_nbytes(source);
  if (from != nullptr && to != nullptr && from->tensor == to->tensor) {
    copy_within_stores(from, source, to, target);
  } else if (from != nullptr && to != nullptr) {
    return false;
  } else if (from != nullptr) {
    get_tensor(source_buffer, source, target->data, 0, bytes);
  } else {
    set_tensor(buffer, target, source->data, 0, bytes);
  }
  return true;
}

void clear_buffer(ggml_backend_buffer_t buffer, std::uint8_t value) {
  KvBuffer* context = context_of(buffer);
  if (value != 0 && !context->has_kv()) {
    std::memset(context->base(), value, context->size());
    return;
  }
  // A KV cache is only ever cleared to zeros.
  const Status cleared = guarded([&] {
    if (context->has_kv()) {
      report_clearing(context);
    }
    const std::lock_guard lock(context->mutex());
    context->clear();
    return ok_status();
  });
  if (!cleared) {
    log_error(cleared.error().message);
  }
}

constexpr ggml_backend_buffer_i kBufferInterface = {
    .free_buffer = free_buffer,
    .get_base = get_base,
    .init_tensor = init_tensor,
    .memset_tensor = memset_tensor,
    .set_tensor = set_tensor,
    .get_tensor = get_tensor,
    .set_tensor_2d = nullptr,  // ggml loops over set_tensor
    .get_tensor_2d = nullptr,
    .cpy_tensor = copy_tensor,
    .clear = clear_buffer,
    .reset = nullptr,
};

const char* get_name(ggml_backend_buffer_type_t /*type*/) { return kDeviceName; }

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, std::size_t size) {
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    log_error("no address space for " + std::to_string(size >> 20) + " MiB");
    return nullptr;
  }
  try {
    auto context =
        std::make_unique<KvBuffer>(static_cast<std::byte*>(base), size, current_settings());
    return ggml_backend_buffer_init(type, kBufferInterface, context.release(), size);
  } catch (const std::exception& error) {
    munmap(base, size);
    log_error(error.what());
    return nullptr;
  }
}

std::size_t get_alignment(ggml_backend_buffer_type_t /*type*/) { return kAlignment; }

// Not host memory to ggml: reads and writes of a KV cache must come through our callbacks.
bool is_host(ggml_backend_buffer_type_t /*type*/) { return false; }

ggml_backend_buffer_type the_type = {
    .iface =
        {
            .get_name = get_name,
            .alloc_buffer = alloc_buffer,
            .get_alignment = get_alignment,
            .get_max_size = nullptr,
            .get_alloc_size = nullptr,
            .is_host = is_host,
        },
    .device = nullptr,
    .context = nullptr,
};

}  // namespace

KvBuffer::KvBuffer(std::byte* base, std::size_t size, Settings settings)
    : base_(base), size_(size), settings_(std::move(settings)) {}

KvBuffer::~KvBuffer() { munmap(base_, size_); }

Status KvBuffer::add(ggml_tensor* tensor, const KvName& name) {
  if (tensor->type != GGML_TYPE_F16) {
    return unsupported(std::string("a KV cache of type ") + ggml_type_name(tensor->type) +
                       " is not served, ZipCache compresses f16 itself: drop -ctk and -ctv");
  }
  const auto narrow = [](std::int64_t n) { return static_cast<std::uint32_t>(n); };
  const std::lock_guard lock(mutex_);
  KvTensor& added = tensors_.emplace_back(KvTensor{.buffer = this,
                                                   .store = nullptr,
                                                   .tensor = name.tensor,
                                                   .layer = name.layer,
                                                   .row = narrow(tensor->ne[0]),
                                                   .n_cells = narrow(tensor->ne[1]),
                                                   .n_streams = narrow(tensor->ne[2])});
  tensor->extra = &added;

  const auto partner = std::find_if(tensors_.begin(), tensors_.end(), [&](const KvTensor& other) {
    return other.layer == name.layer && other.tensor != name.tensor && other.store == nullptr;
  });
  if (partner == tensors_.end()) {
    return ok_status();
  }
  if (partner->n_cells != added.n_cells || partner->n_streams != added.n_streams) {
    return unsupported("keys and values of layer " + std::to_string(name.layer) +
                       " have different numbers of cells");
  }
  const KvTensor& keys = name.tensor == Tensor::kKey ? added : *partner;
  const KvTensor& values = name.tensor == Tensor::kKey ? *partner : added;
  stores_.push_back(std::make_unique<KvStore>(KvStore::Shape{.layer = name.layer,
                                                             .n_streams = added.n_streams,
                                                             .n_cells = added.n_cells,
                                                             .key_row = keys.row,
                                                             .value_row = values.row},
                                              settings_.policy, settings_.budget));
  if (settings_.observes) {
    stores_.back()->observe();
  }
  partner->store = added.store = stores_.back().get();
  return ok_status();
}

void KvBuffer::clear() {
  for (const auto& store : stores_) {
    store->clear();
  }
  error_.reset();
  madvise(base_, size_, MADV_DONTNEED);
}

void KvBuffer::keep_error(const Error& error) {
  if (!error_) {
    error_ = error;
  }
}

std::optional<Error> KvBuffer::take_error() { return std::exchange(error_, std::nullopt); }

cache::ByteCount KvBuffer::bytes() const {
  cache::ByteCount sum;
  for (const auto& store : stores_) {
    sum += store->bytes();
  }
  return sum;
}

std::uint64_t KvBuffer::live_tokens() const {
  std::uint64_t most = 0;
  for (const auto& store : stores_) {
    most = std::max(most, store->live_tokens());
  }
  return most;
}

std::vector<policy::LayerCalibration> KvBuffer::channels() const {
  std::vector<policy::LayerCalibration> all;
  for (const auto& store : stores_) {
    if (store->observer() != nullptr) {
      if (auto seen = store->observer()->seen()) {
        all.push_back(std::move(*seen));
      }
    }
  }
  return all;
}

double KvBuffer::policy_seconds() const {
  double sum = 0;
  for (const auto& store : stores_) {
    sum += store->policy_seconds();
  }
  return sum;
}

ggml_backend_buffer_type_t buffer_type() { return &the_type; }

void set_buffer_type_device(ggml_backend_dev_t device) { the_type.device = device; }

KvTensor* kv_tensor(const ggml_tensor* tensor) {
  // Dummy buffers of measuring passes have our type but no context: extra stays nullptr there.
  return is_kv(tensor, buffer_type()) ? static_cast<KvTensor*>(base_of(tensor)->extra) : nullptr;
}

}  // namespace zipcache::ggml
