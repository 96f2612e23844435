#include "ggml/device.h"

#include <string>

#include "ggml.h"
#include "ggml/backend.h"
#include "ggml/buffer.h"
#include "ggml/log.h"
#include "ggml/registry.h"
#include "ggml/tables.h"
#include "ggml/take_over.h"

namespace zipcache::ggml {
namespace {

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

struct Device {
  static constexpr const char* kName = kDeviceName;
  static ggml_backend_dev_t inner() { return host().cpu; }
  static ggml_backend_buffer_type_t buffer_type() { return ggml::buffer_type(); }
  static NodeClass classify(const ggml_tensor* op) { return ggml::classify(op, buffer_type()); }
  static bool inner_supports(const ggml_tensor* op) { return cpu_supports(op); }
  static void note(const ggml_tensor* /*op*/, NodeKind /*kind*/) {}
  static void restrict(ggml_backend_dev_props* props) {
    props->device_id = nullptr;
    props->caps.host_buffer = false;
  }
  static ggml_backend_t make_backend(ggml_backend_dev_t device) {
    return ggml::make_backend(device);
  }
};

}  // namespace

ggml_backend_device_i device_interface() {
  ggml_backend_device_i table = DeviceTable<Device>::make();
  table.buffer_from_host_ptr = buffer_from_host_ptr;
  return table;
}

}  // namespace zipcache::ggml
