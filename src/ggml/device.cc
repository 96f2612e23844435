#include "ggml/device.h"

#include <exception>
#include <string>

#include "ggml.h"
#include "ggml/backend.h"
#include "ggml/buffer.h"
#include "ggml/log.h"
#include "ggml/registry.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

const char* get_name(ggml_backend_dev_t /*device*/) { return kDeviceName; }

const char* get_description(ggml_backend_dev_t /*device*/) {
  static const std::string kDescription =
      std::string("compressed KV cache on ") + ggml_backend_dev_description(host().cpu);
  return kDescription.c_str();
}

void get_memory(ggml_backend_dev_t /*device*/, std::size_t* free, std::size_t* total) {
  ggml_backend_dev_memory(host().cpu, free, total);
}

// The host gives layers, with their KV cache, to devices of type GPU only.
enum ggml_backend_dev_type get_type(ggml_backend_dev_t /*device*/) {
  return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void get_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  ggml_backend_dev_get_props(host().cpu, props);
  props->name = get_name(device);
  props->description = get_description(device);
  props->type = get_type(device);
  props->device_id = nullptr;
  props->caps.async = false;
  props->caps.host_buffer = false;
  props->caps.events = false;
}

ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t /*device*/) { return buffer_type(); }

// Weights mapped from a file stay where they are.
ggml_backend_buffer_t buffer_from_host_ptr(ggml_backend_dev_t /*device*/, void* data,
                                           std::size_t size, std::size_t max_tensor_size) {
  return ggml_backend_dev_buffer_from_host_ptr(host().cpu, data, size, max_tensor_size);
}

bool is_extra(ggml_backend_buffer_type_t type) {
  for (auto* extra = host().extra_buffer_types; extra != nullptr && *extra != nullptr; ++extra) {
    if (*extra == type) {
      return true;
    }
  }
  return false;
}

bool is_matmul(const ggml_tensor* op) {
  return op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID;
}

// Asks the CPU device about `op` with its weights in a buffer of type `weights_in` (nullptr: where
// they are). It refuses activations outside of host memory, which ours are not to ggml, so they are
// shown without a buffer.
bool cpu_takes_matmul(const ggml_tensor* op, ggml_backend_buffer_type_t weights_in) {
  ggml_tensor weights = *op->src[0];
  ggml_tensor activations = *op->src[1];
  ggml_tensor asked = *op;
  ggml_backend_buffer dummy{};
  if (weights_in != nullptr) {
    dummy.buft = weights_in;
    weights.buffer = &dummy;
  }
  activations.buffer = nullptr;
  asked.src[0] = &weights;
  asked.src[1] = &activations;
  return ggml_backend_dev_supports_op(host().cpu, &asked);
}

// The CPU device has faster layouts for some weights ("extra" buffer types). llama.cpp offers
// weights to a GPU's own type first and to those only if that is refused, so refuse them.
bool has_faster_layout(const ggml_tensor* op) {
  const ggml_backend_buffer_t buffer = op->src[0]->buffer;
  if (buffer == nullptr || buffer->buft != buffer_type() ||
      buffer->usage == GGML_BACKEND_BUFFER_USAGE_COMPUTE) {
    return false;
  }
  for (auto* extra = host().extra_buffer_types; extra != nullptr && *extra != nullptr; ++extra) {
    if (cpu_takes_matmul(op, *extra)) {
      return true;
    }
  }
  return false;
}

bool cpu_supports(const ggml_tensor* op) {
  if (is_matmul(op)) {
    if (op->src[0]->buffer != nullptr && is_extra(op->src[0]->buffer->buft)) {
      return cpu_takes_matmul(op, nullptr);
    }
    if (has_faster_layout(op)) {
      return false;
    }
  }
  return ggml_backend_dev_supports_op(host().cpu, op);
}

bool supports_op(ggml_backend_dev_t /*device*/, const ggml_tensor* op) {
  try {
    const NodeClass found = classify(op, buffer_type());
    switch (found.kind) {
      case NodeKind::kOther:
        return cpu_supports(op);
      case NodeKind::kStore:
      case NodeKind::kAttend:
      case NodeKind::kShift:
        return true;
      case NodeKind::kElsewhere:
        // Left to the device of that layer: llama.cpp turns flash attention off (-fa auto) when it
        // finds it on another one.
        return false;
      case NodeKind::kRefused:
        // A "no" to a write would abort the process, and to a read would make llama.cpp compute it
        // elsewhere, on a decompressed copy per step. So it is taken, and fails when computed.
        log_warning_once(found.reason);
        return true;
    }
  } catch (const std::exception& error) {
    log_error(error.what());
  }
  return false;
}

bool supports_buft(ggml_backend_dev_t /*device*/, ggml_backend_buffer_type_t type) {
  return type == buffer_type() || ggml_backend_dev_supports_buft(host().cpu, type);
}

}  // namespace

ggml_backend_device_i device_interface() {
  return {
      .get_name = get_name,
      .get_description = get_description,
      .get_memory = get_memory,
      .get_type = get_type,
      .get_props = get_props,
      .init_backend = make_backend,
      .get_buffer_type = get_buffer_type,
      .get_host_buffer_type = nullptr,
      .buffer_from_host_ptr = buffer_from_host_ptr,
      .supports_op = supports_op,
      .supports_buft = supports_buft,
      .offload_op = nullptr,
      .event_new = nullptr,
      .event_free = nullptr,
      .event_synchronize = nullptr,
  };
}

}  // namespace zipcache::ggml
