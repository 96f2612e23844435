// The plug-in as ggml sees it: a registry with one device. What all its parts share is set up once,
// when the host loads it.
#pragma once

#include <string>

#include "base/expected.h"
#include "ggml-backend.h"
#include "ggml/host.h"
#include "ggml/settings.h"
#include "kernels/kernels.h"

namespace zipcache::ggml {

inline constexpr const char* kDeviceName = "ZipCache";

// Reads the environment, finds the host's CPU device and chooses the kernels; the same registry
// each time. An error says in one line why the plug-in can't be used.
Expected<ggml_backend_reg_t> make_registry();

// Valid once make_registry() succeeded.
ggml_backend_dev_t device();
const Host& host();
const kernels::KernelTable& kernel_table();

// Settings for KV caches made from now on.
Settings current_settings();

}  // namespace zipcache::ggml
