// In-place ROPE on a KV cache's keys: the host moves tokens to other positions (context shift,
// reuse of cached chunks).
#pragma once

#include <memory>

#include "ggml/step.h"

namespace zipcache::ggml {

// Rotates with the host's own operation, on `cpu`: a backend that no graph is running on.
// REQUIRES: classify(node) is kShift and its tensor has a store.
std::unique_ptr<Step> make_shift_step(StepContext* context, const ggml_tensor* node,
                                      ggml_backend_t cpu);

}  // namespace zipcache::ggml
