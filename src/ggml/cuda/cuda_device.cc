#include "ggml-backend-impl.h"
#include "ggml.h"
#include "ggml/cuda/cuda_node.h"
#include "ggml/cuda/cuda_registry.h"
#include "ggml/tables.h"

namespace zipcache::ggml {
namespace {

struct Device {
  static constexpr const char* kName = kCudaDeviceName;
  static ggml_backend_dev_t inner() { return inner_device(); }
  static ggml_backend_buffer_type_t buffer_type() { return cuda_buffer_type(); }
  static NodeClass classify(const ggml_tensor* op) {
    return takes_over() ? classify_cuda(op) : NodeClass{};
  }
  static bool inner_supports(const ggml_tensor* op) {
    return ggml_backend_dev_supports_op(inner_device(), op);
  }
  // Rows may be restored before any attention is computed.
  static void note(const ggml_tensor* op, NodeKind kind) {
    const CudaKvTensor* keys = kind == NodeKind::kAttend ? cuda_kv_tensor(op->src[1]) : nullptr;
    if (keys != nullptr) {
      const AttendShape shape = attend_shape(op);
      keys->group->buffer->note_heads(keys->group, shape.n_kv_heads, shape.key_dim);
    }
  }
  static void restrict(ggml_backend_dev_props* props) { props->caps.buffer_from_host_ptr = false; }
  static ggml_backend_t make_backend(ggml_backend_dev_t device) {
    return make_cuda_backend(device);
  }
};

}  // namespace

ggml_backend_device_i cuda_device_interface() {
  ggml_backend_device_i table = DeviceTable<Device>::make();
  table.get_host_buffer_type = [](ggml_backend_dev_t) {
    return ggml_backend_dev_host_buffer_type(inner_device());
  };
  table.offload_op = [](ggml_backend_dev_t, const ggml_tensor* op) {
    return ggml_backend_dev_offload_op(inner_device(), op);
  };
  return table;
}

}  // namespace zipcache::ggml
