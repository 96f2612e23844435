// The device that the host assigns layers to. It computes what the CPU device computes, and the KV
// cache itself.
#pragma once

#include "ggml-backend-impl.h"

namespace zipcache::ggml {

ggml_backend_device_i device_interface();

}  // namespace zipcache::ggml
