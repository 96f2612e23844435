// SET_ROWS into a KV tensor: the new tokens of a step.
#pragma once

#include <memory>

#include "ggml/step.h"

namespace zipcache::ggml {

// REQUIRES: classify(node) is kStore and its tensor has a store.
std::unique_ptr<Step> make_store_step(StepContext* context, const ggml_tensor* node);

}  // namespace zipcache::ggml
