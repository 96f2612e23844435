// One backend object of the device, as each context of the host makes its own: takes graphs, hands
// the KV nodes to our steps and all others to a CPU backend of the host.
#pragma once

#include "ggml-backend.h"

namespace zipcache::ggml {

// nullptr when the host refuses a CPU backend.
ggml_backend_t make_backend(ggml_backend_dev_t device);

// Found by the host through get_proc_address, called before graphs.
void set_n_threads(ggml_backend_t backend, int n_threads);
void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data);

}  // namespace zipcache::ggml
