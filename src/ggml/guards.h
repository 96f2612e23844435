// What the callbacks of both plug-ins share: nothing is thrown into the host, errors become its
// status values and a line.
#pragma once

#include <cstddef>
#include <exception>
#include <new>

#include "base/expected.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "ggml/log.h"

namespace zipcache::ggml {

// Runs `work`, which returns a Status, so that nothing is thrown.
template <typename Work>
Status guarded(Work&& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return out_of_memory("no memory left");
  } catch (const std::exception& error) {
    return invalid_argument(error.what());
  }
}

// For the host, after a line for the user.
inline ggml_status failed(const Error& error) {
  log_error(error.message);
  return error.code == ErrorCode::kOutOfMemory ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
}

// Where byte `offset` of a KV tensor's view lies in the tensor itself.
inline std::size_t offset_in_base(const ggml_tensor* tensor, std::size_t offset) {
  return (tensor->view_src != nullptr ? tensor->view_offs : 0) + offset;
}

}  // namespace zipcache::ggml
