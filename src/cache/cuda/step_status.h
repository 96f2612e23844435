// What the steps of a device cache have in common: stopping at the first failure, copies.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

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

}  // namespace zipcache::cuda
