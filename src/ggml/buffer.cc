#include "ggml/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <utility>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/guards.h"
#include "ggml/log.h"
#include "ggml/registry.h"
#include "ggml/report.h"
#include "ggml/tables.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

constexpr std::size_t kAlignment = 64;

Status with_store(const KvTensor& kv, const auto& access) {
  return kv.store == nullptr
             ? unsupported("layer " + std::to_string(kv.layer) + " has keys without values")
             : access(*kv.store);
}

struct Memory {
  using Buffer = KvBuffer;
  using Kv = KvTensor;
  static const KvTensor* kv(const ggml_tensor* tensor) { return kv_tensor(tensor); }
  static KvBuffer* buffer_of(const KvTensor& kv) { return kv.buffer; }

  static Status read(const KvTensor& kv, std::size_t offset, std::size_t size, void* out) {
    if (kv.store == nullptr) {
      std::memset(out, 0, size);
    }
    return with_store(kv, [&](KvStore& store) {
      store.read(kv.tensor, offset, size, out);
      return ok_status();
    });
  }
  static Status write(const KvTensor& kv, std::size_t offset, std::size_t size, const void* data) {
    return with_store(kv,
                      [&](KvStore& store) { return store.write(kv.tensor, offset, size, data); });
  }
  static Status write_zeros(const KvTensor& kv, std::size_t offset, std::size_t size) {
    return with_store(kv,
                      [&](KvStore& store) { return store.write_zeros(kv.tensor, offset, size); });
  }
  static Status copy(const KvTensor& from, std::size_t from_offset, const KvTensor& to,
                     std::size_t to_offset, std::size_t size) {
    return with_store(from, [&](KvStore& source) {
      return with_store(to, [&](KvStore& target) {
        return target.copy(to.tensor, to_offset, size, source, from_offset);
      });
    });
  }

  static void fill(KvBuffer* /*buffer*/, void* to, int value, std::size_t size) {
    std::memset(to, value, size);
  }
  static void set(KvBuffer* /*buffer*/, void* to, const void* from, std::size_t size) {
    std::memcpy(to, from, size);
  }
  static void get(void* to, const void* from, std::size_t size) { std::memcpy(to, from, size); }
  static void move(KvBuffer* /*buffer*/, void* to, const void* from, std::size_t size) {
    std::memmove(to, from, size);
  }

  static void close(KvBuffer* buffer) {
    if (buffer->has_kv()) {
      report_closed(buffer);
    }
  }
  static ggml_status init(ggml_backend_buffer_t buffer, ggml_tensor* tensor);
  static void clear(KvBuffer* buffer, std::uint8_t value) {
    if (value != 0 && !buffer->has_kv()) {
      std::memset(buffer->base(), value, buffer->size());
      return;
    }
    // A KV cache is only ever cleared to zeros.
    if (buffer->has_kv()) {
      report_clearing(buffer);
    }
    const std::lock_guard lock(buffer->mutex());
    buffer->clear();
  }
};
using Table = BufferTable<Memory>;

// Called for every tensor and view of every graph, so most calls must leave at the first line.
ggml_status Memory::init(ggml_backend_buffer_t buffer, ggml_tensor* tensor) {
  if (tensor->view_src != nullptr || tensor->op != GGML_OP_NONE) {
    return GGML_STATUS_SUCCESS;
  }
  const auto name = parse_kv_name(tensor->name);
  if (!name) {
    return GGML_STATUS_SUCCESS;
  }
  KvBuffer* context = Table::of(buffer);
  const bool first = !context->has_kv();
  const Status added = guarded([&] { return context->add(tensor, *name); });
  if (!added) {
    return failed(added.error());
  }
  if (first) {
    report_opened(context);
  }
  return GGML_STATUS_SUCCESS;
}

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
    return ggml_backend_buffer_init(type, Table::interface(), context.release(), size);
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
