// Holds the mutexes of all buffers of a graph, without allocating.
#pragma once

#include <span>

namespace zipcache::ggml {

// REQUIRES: `buffers` stays as it is meanwhile, and is sorted: two backends that share two buffers
// take them in one order and can't wait for each other.
template <typename Buffer>
class BufferLocks {
 public:
  explicit BufferLocks(std::span<Buffer* const> buffers) : buffers_(buffers) {
    for (Buffer* buffer : buffers_) {
      buffer->mutex().lock();
    }
  }
  ~BufferLocks() {
    for (Buffer* buffer : buffers_) {
      buffer->mutex().unlock();
    }
  }
  BufferLocks(const BufferLocks&) = delete;
  BufferLocks& operator=(const BufferLocks&) = delete;

 private:
  const std::span<Buffer* const> buffers_;
};

}  // namespace zipcache::ggml
