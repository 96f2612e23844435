#include <exception>
#include <string>

#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/cuda/cuda_node.h"
#include "ggml/cuda/cuda_registry.h"
#include "ggml/log.h"

namespace zipcache::ggml {
namespace {

const char* get_name(ggml_backend_dev_t /*device*/) { return kCudaDeviceName; }

const char* get_description(ggml_backend_dev_t /*device*/) {
  static const std::string kDescription =
      std::string("compressed KV cache on ") + ggml_backend_dev_description(inner_device());
  return kDescription.c_str();
}

void get_memory(ggml_backend_dev_t /*device*/, std::size_t* free, std::size_t* total) {
  ggml_backend_dev_memory(inner_device(), free, total);
}

enum ggml_backend_dev_type get_type(ggml_backend_dev_t /*device*/) {
  return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void get_props(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  ggml_backend_dev_get_props(inner_device(), props);
  props->name = get_name(device);
  props->description = get_description(device);
  props->type = get_type(device);
  props->caps.async = false;
  props->caps.events = false;
  props->caps.buffer_from_host_ptr = false;
}

ggml_backend_buffer_type_t get_buffer_type(ggml_backend_dev_t /*device*/) {
  return cuda_buffer_type();
}

ggml_backend_buffer_type_t get_host_buffer_type(ggml_backend_dev_t /*device*/) {
  return ggml_backend_dev_host_buffer_type(inner_device());
}

void note_heads(const ggml_tensor* attend) {
  const AttendShape shape = attend_shape(attend);
  if (const CudaKvTensor* keys = cuda_kv_tensor(attend->src[1])) {
    keys->group->buffer->note_heads(keys->group, shape.n_kv_heads, shape.key_dim);
  }
}

bool supports_op(ggml_backend_dev_t /*device*/, const ggml_tensor* op) {
  if (!takes_over()) {
    return ggml_backend_dev_supports_op(inner_device(), op);
  }
  try {
    const NodeClass found = classify_cuda(op);
    switch (found.kind) {
      case NodeKind::kOther:
        return ggml_backend_dev_supports_op(inner_device(), op);
      case NodeKind::kAttend:
        note_heads(op);
        return true;
      case NodeKind::kStore:
      case NodeKind::kShift:
        return true;
      case NodeKind::kElsewhere:
        return false;
      case NodeKind::kRefused:
        // As on the CPU: a "no" would abort, or read the cache elsewhere; it fails when computed.
        log_warning_once(found.reason);
        return true;
    }
  } catch (const std::exception& error) {
    log_error(error.what());
  }
  return false;
}

bool supports_buft(ggml_backend_dev_t /*device*/, ggml_backend_buffer_type_t type) {
  return type == cuda_buffer_type() || ggml_backend_dev_supports_buft(inner_device(), type);
}

bool offload_op(ggml_backend_dev_t /*device*/, const ggml_tensor* op) {
  return ggml_backend_dev_offload_op(inner_device(), op);
}

}  // namespace

ggml_backend_device_i cuda_device_interface() {
  return {
      .get_name = get_name,
      .get_description = get_description,
      .get_memory = get_memory,
      .get_type = get_type,
      .get_props = get_props,
      .init_backend = make_cuda_backend,
      .get_buffer_type = get_buffer_type,
      .get_host_buffer_type = get_host_buffer_type,
      .buffer_from_host_ptr = nullptr,
      .supports_op = supports_op,
      .supports_buft = supports_buft,
      .offload_op = offload_op,
      .event_new = nullptr,
      .event_free = nullptr,
      .event_synchronize = nullptr,
  };
}

}  // namespace zipcache::ggml
