// Errors that end the bench, and device memory that frees itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "base/expected.h"

namespace zipcache::cuda {

inline void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
  }
}
#define REQUIRE(call) require((call), #call)

inline void require_ok(const Status& status) {
  if (!status) {
    std::fprintf(stderr, "%s\n", status.error().message.c_str());
    std::exit(1);
  }
}
template <typename T>
const T& require_ok(const Expected<T>& value) {
  if (!value) {
    std::fprintf(stderr, "%s\n", value.error().message.c_str());
    std::exit(1);
  }
  return *value;
}

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t n) : size_(n) {
    REQUIRE(cudaMalloc(&data_, std::max<std::size_t>(n, 1) * sizeof(T)));
  }
  explicit DeviceBuffer(const std::vector<T>& from) : DeviceBuffer(from.size()) {
    REQUIRE(cudaMemcpy(data_, from.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  T* data() const { return data_; }
  // The first `n` elements; waits for the device.
  std::vector<T> to_host(std::size_t n) const {
    std::vector<T> out(n);
    REQUIRE(cudaMemcpy(out.data(), data_, n * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
  std::vector<T> to_host() const { return to_host(size_); }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace zipcache::cuda
