// The CUDA plug-in, libggml-zipcache-cuda.so, as ggml sees it: a registry with one device,
// ZipCacheCUDA, that wraps the host's CUDA0. It reports CUDA0's id, so that a host which is told no
// device goes on with CUDA0 alone: ours is chosen by -dev ZipCacheCUDA.
#pragma once

#include "base/expected.h"
#include "ggml-backend-impl.h"
#include "ggml/settings.h"

namespace zipcache::ggml {

inline constexpr const char* kCudaDeviceName = "ZipCacheCUDA";

// The same registry each time. An error says in one line why the plug-in can't be used.
Expected<ggml_backend_reg_t> make_cuda_registry();

// Valid once make_cuda_registry() succeeded.
ggml_backend_dev_t inner_device();  // CUDA0
// Policies that seal are served by our kernels; under fp16 the device is CUDA0 as it is.
bool takes_over();
const Settings& cuda_settings();

ggml_backend_device_i cuda_device_interface();
ggml_backend_buffer_type_t cuda_buffer_type();
void set_cuda_buffer_type_device(ggml_backend_dev_t device);
ggml_backend_t make_cuda_backend(ggml_backend_dev_t device);

}  // namespace zipcache::ggml
