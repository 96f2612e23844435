// What the steps of a device cache have in common: stopping at the first failure, copies.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cache/cuda/device_memory.h"

// Returns what failed.
#define ZC_TRY(expression)                     \
  do {                                         \
    if (Status tried = (expression); !tried) { \
      return tried;                            \
    }                                          \
  } while (false)

namespace zipcache::cuda {

inline Status copy_async(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                         Stream stream) {
  return bytes == 0 ? ok_status()
                    : to_status(cudaMemcpyAsync(to, from, bytes, kind, stream), "copy");
}

// Small arrays for one call; the copies are done with the host's memory when they return.
template <typename T>
Status send(DeviceArray& to, const std::vector<T>& values, Stream stream) {
  ZC_TRY(to.ensure(std::max<std::size_t>(values.size() * sizeof(T), 1), stream));
  return copy_async(to.as<std::byte>(), values.data(), values.size() * sizeof(T),
                    cudaMemcpyHostToDevice, stream);
}

}  // namespace zipcache::cuda
