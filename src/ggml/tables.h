// ggml's tables of functions, written once for both plug-ins (CPU, CUDA): a registry with one
// device, the device, its backend objects and its buffers. Each template takes a class of static
// functions that says what differs. Nothing is thrown into the host.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/guards.h"
#include "ggml/log.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {

// Plugin: kName, device(), proc_address(name).
template <typename Plugin>
class RegistryTable {
 public:
  static ggml_backend_reg make() {
    return {.api_version = GGML_BACKEND_API_VERSION,
            .iface = {.get_name = [](ggml_backend_reg_t) { return Plugin::kName; },
                      .get_device_count = [](ggml_backend_reg_t) { return std::size_t{1}; },
                      .get_device = [](ggml_backend_reg_t, std::size_t) -> ggml_backend_dev_t {
                        return Plugin::device();
                      },
                      .get_proc_address = [](ggml_backend_reg_t, const char* name) -> void* {
                        return Plugin::proc_address(name);
                      }},
            .context = nullptr};
  }
};

// Device: kName; inner(), the host's device that it wraps; buffer_type(); classify(op);
// inner_supports(op); note(op), of one that is taken over; restrict(props); make_backend(device).
template <typename Device>
class DeviceTable {
 public:
  // Entries that only some devices have are the caller's to add.
  static ggml_backend_device_i make() {
    ggml_backend_device_i table{};
    table.get_name = get_name;
    table.get_description = get_description;
    table.get_memory = [](ggml_backend_dev_t, std::size_t* free, std::size_t* total) {
      ggml_backend_dev_memory(Device::inner(), free, total);
    };
    table.get_type = get_type;
    table.get_props = get_props;
    table.init_backend = [](ggml_backend_dev_t device, const char* /*params*/) {
      return Device::make_backend(device);
    };
    table.get_buffer_type = [](ggml_backend_dev_t) { return Device::buffer_type(); };
    table.supports_op = supports_op;
    table.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
      return type == Device::buffer_type() || ggml_backend_dev_supports_buft(Device::inner(), type);
    };
    return table;
  }

 private:
  static const char* get_name(ggml_backend_dev_t /*device*/) { return Device::kName; }
  static const char* get_description(ggml_backend_dev_t /*device*/) {
    static const std::string kDescription =
        std::string("compressed KV cache on ") + ggml_backend_dev_description(Device::inner());
    return kDescription.c_str();
  }
  // The host gives layers, with their KV cache, to devices of type GPU only.
  static enum ggml_backend_dev_type get_type(ggml_backend_dev_t /*device*/) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
  }
  static void get_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
    ggml_backend_dev_get_props(Device::inner(), props);
    props->name = get_name(device);
    props->description = get_description(device);
    props->type = get_type(device);
    props->caps.async = false;
    props->caps.events = false;
    Device::restrict(props);
  }
  static bool supports_op(ggml_backend_dev_t /*device*/, const ggml_tensor* op) {
    try {
      const NodeClass found = Device::classify(op);
      switch (found.kind) {
        case NodeKind::kOther:
          return Device::inner_supports(op);
        case NodeKind::kStore:
        case NodeKind::kAttend:
        case NodeKind::kShift:
          Device::note(op, found.kind);
          return true;
        case NodeKind::kElsewhere:
          // Left to the device of that layer: llama.cpp turns flash attention off (-fa auto) when
          // it finds it on another one.
          return false;
        case NodeKind::kRefused:
          // A "no" to a write would abort the process, and to a read would make llama.cpp compute
          // it elsewhere, on a decompressed copy per step. So it is taken, and fails when computed.
          log_warning_once(found.reason);
          return true;
      }
    } catch (const std::exception& error) {
      log_error(error.what());
    }
    return false;
  }
};

// Backend: kName, compute(graph) and, unless graphs are computed before that returns,
// synchronize().
template <typename Backend>
class BackendTable {
 public:
  static Backend* of(ggml_backend_t backend) { return static_cast<Backend*>(backend->context); }

  // `make` returns a unique_ptr; nullptr is passed on to the host.
  template <typename Make>
  static ggml_backend_t create(ggml_backend_dev_t device, ggml_guid_t guid, Make&& make) {
    try {
      allow_repeats();
      std::unique_ptr<Backend> context = make();
      return context == nullptr ? nullptr
                                : new ggml_backend{.guid = guid,
                                                   .iface = kInterface,
                                                   .device = device,
                                                   .context = context.release()};
    } catch (const std::exception& error) {
      log_error(error.what());
      return nullptr;
    }
  }

 private:
  static const char* get_name(ggml_backend_t /*backend*/) { return Backend::kName; }
  static void free_backend(ggml_backend_t backend) {
    delete of(backend);
    delete backend;
  }
  static constexpr bool kIsAsync = requires(Backend & backend) { backend.synchronize(); };
  static void synchronize(ggml_backend_t backend) {
    if constexpr (kIsAsync) {
      of(backend)->synchronize();
    }
  }
  static ggml_status compute_graph(ggml_backend_t backend, ggml_cgraph* graph) {
    try {
      return of(backend)->compute(graph);
    } catch (const std::bad_alloc&) {
      log_error("no memory left for a graph");
      return GGML_STATUS_ALLOC_FAILED;
    } catch (const std::exception& error) {
      log_error(error.what());
      return GGML_STATUS_FAILED;
    }
  }

  static constexpr ggml_backend_i kInterface = {
      .get_name = get_name,
      .free = free_backend,
      .set_tensor_async = nullptr,
      .get_tensor_async = nullptr,
      .set_tensor_2d_async = nullptr,
      .get_tensor_2d_async = nullptr,
      .cpy_tensor_async = nullptr,
      .synchronize = kIsAsync ? synchronize : nullptr,
      .graph_plan_create = nullptr,
      .graph_plan_free = nullptr,
      .graph_plan_update = nullptr,
      .graph_plan_compute = nullptr,
      .graph_compute = compute_graph,
      .event_record = nullptr,
      .event_wait = nullptr,
      .graph_optimize = nullptr,
  };
};

// Memory: Buffer with base(), mutex(), keep_error(); Kv, what a KV tensor's `extra` is.
//   kv(tensor), buffer_of(kv); read, write, write_zeros, copy: bytes of KV tensors, under the lock
//   fill, set, get, move: of ordinary memory;  is_host: which `data` pointers show
//   close(buffer), init(buffer, tensor), clear(buffer, value)
template <typename Memory>
class BufferTable {
  using Buffer = typename Memory::Buffer;
  using Kv = typename Memory::Kv;

 public:
  static Buffer* of(ggml_backend_buffer_t buffer) { return static_cast<Buffer*>(buffer->context); }

  static constexpr ggml_backend_buffer_i interface() {
    return {
        .free_buffer = free_buffer,
        .get_base = [](ggml_backend_buffer_t buffer) -> void* { return of(buffer)->base(); },
        .init_tensor = Memory::init,
        .memset_tensor = memset_tensor,
        .set_tensor = set_tensor,
        .get_tensor = get_tensor,
        .set_tensor_2d = nullptr,  // ggml loops over set_tensor
        .get_tensor_2d = nullptr,
        .cpy_tensor = copy_tensor,
        .clear = clear,
        .reset = nullptr,
    };
  }

 private:
  static std::byte* at(const ggml_tensor* tensor, std::size_t offset) {
    return static_cast<std::byte*>(tensor->data) + offset;
  }
  // A line is all that the host can be told here.
  static void report(const Status& done) {
    if (!done) {
      log_error(done.error().message);
    }
  }
  // The same, and the next graph fails. The lock is held.
  static void must_succeed(const Kv& kv, const char* what, const Status& done) {
    if (!done) {
      log_error(std::string(what) + ": " + done.error().message);
      Memory::buffer_of(kv)->keep_error(done.error());
    }
  }
  template <typename Access>
  static void with_kv(const Kv& kv, const char* what, Access&& access) {
    const std::lock_guard lock(Memory::buffer_of(kv)->mutex());
    must_succeed(kv, what, guarded(access));
  }

  static void free_buffer(ggml_backend_buffer_t buffer) {
    report(guarded([&] {
      Memory::close(of(buffer));
      return ok_status();
    }));
    delete of(buffer);
  }
  static void clear(ggml_backend_buffer_t buffer, std::uint8_t value) {
    report(guarded([&] {
      Memory::clear(of(buffer), value);
      return ok_status();
    }));
  }

  static void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor, std::uint8_t value,
                            std::size_t offset, std::size_t size) {
    if (const Kv* kv = Memory::kv(tensor)) {
      return with_kv(*kv, "filling the KV cache", [&]() -> Status {
        return value == 0 ? Memory::write_zeros(*kv, offset_in_base(tensor, offset), size)
                          : unsupported("only zeros may fill it");
      });
    }
    Memory::fill(of(buffer), at(tensor, offset), value, size);
  }
  static void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor* tensor, const void* data,
                         std::size_t offset, std::size_t size) {
    if (const Kv* kv = Memory::kv(tensor)) {
      return with_kv(*kv, "writing to the KV cache", [&] {
        return Memory::write(*kv, offset_in_base(tensor, offset), size, data);
      });
    }
    Memory::set(of(buffer), at(tensor, offset), data, size);
  }
  static void get_tensor(ggml_backend_buffer_t /*buffer*/, const ggml_tensor* tensor, void* data,
                         std::size_t offset, std::size_t size) {
    if (const Kv* kv = Memory::kv(tensor)) {
      return with_kv(*kv, "reading the KV cache",
                     [&] { return Memory::read(*kv, offset_in_base(tensor, offset), size, data); });
    }
    Memory::get(data, at(tensor, offset), size);
  }

  static void copy_kv(const Kv& from, const ggml_tensor* source, const Kv& to,
                      const ggml_tensor* target) {
    std::unique_lock lock_to(Memory::buffer_of(to)->mutex(), std::defer_lock);
    std::unique_lock lock_from(Memory::buffer_of(from)->mutex(), std::defer_lock);
    if (lock_to.mutex() == lock_from.mutex()) {
      lock_to.lock();
    } else {
      std::lock(lock_to, lock_from);
    }
    must_succeed(to, "copying the KV cache", guarded([&] {
                   return Memory::copy(from, offset_in_base(source, 0), to,
                                       offset_in_base(target, 0), ggml_nbytes(source));
                 }));
  }
  // False: the host copies by way of memory of its own.
  static bool copy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor* source,
                          ggml_tensor* target) {
    const ggml_backend_buffer_t source_buffer = base_of(source)->buffer;
    if (source_buffer == nullptr || source_buffer->buft != buffer->buft) {
      return false;
    }
    const Kv* const from = Memory::kv(source);
    const Kv* const to = Memory::kv(target);
    if (from == nullptr && to == nullptr) {
      Memory::move(of(buffer), target->data, source->data, ggml_nbytes(source));
      return true;
    }
    if (from != nullptr && to != nullptr && from->tensor == to->tensor) {
      copy_kv(*from, source, *to, target);
      return true;
    }
    return false;
  }
};

}  // namespace zipcache::ggml
