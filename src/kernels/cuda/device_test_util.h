// Device memory and random numbers for the tests of this room.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/philox.h"

namespace zipcache::cuda {

inline void require(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

inline bool has_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// A test that needs a device is skipped, not failed, where there is none.
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!has_device()) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

// An array on the device, between guard bands that must stay as they are.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  // Every byte `fill`: 0xff makes a NaN of every float and half.
  explicit DeviceArray(std::size_t size, int fill = 0xff) : size_(size) {
    require(cudaMalloc(&raw_, bytes() + 2 * kGuard));
    require(cudaMemset(raw_, kGuardByte, bytes() + 2 * kGuard));
    require(cudaMemset(raw_ + kGuard, fill, bytes()));
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    require(cudaMemcpy(data(), from.data(), bytes(), cudaMemcpyHostToDevice));
  }
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(raw_, other.raw_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceArray() { cudaFree(raw_); }

  T* data() const { return reinterpret_cast<T*>(raw_ + kGuard); }
  std::size_t size() const { return size_; }
  void fill(int byte) { require(cudaMemset(data(), byte, bytes())); }
  // Waits for the device.
  std::vector<T> to_host() const {
    std::vector<T> out(size_);
    require(cudaMemcpy(out.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    return out;
  }
  bool guards_intact() const {
    std::vector<unsigned char> all(bytes() + 2 * kGuard);
    require(cudaMemcpy(all.data(), raw_, all.size(), cudaMemcpyDeviceToHost));
    for (std::size_t at = 0; at < kGuard; ++at) {
      if (all[at] != kGuardByte || all[all.size() - 1 - at] != kGuardByte) {
        return false;
      }
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 256;
  static constexpr unsigned char kGuardByte = 0xcd;
  std::size_t bytes() const { return size_ * sizeof(T); }

  unsigned char* raw_ = nullptr;
  std::size_t size_ = 0;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : philox_(seed, 0, 0) {}
  std::uint32_t below(std::uint32_t bound) { return philox_.below(bound); }
  float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(philox_.next() >> 8) * 0x1p-24f;
  }
  float normal() {
    const float radius = std::sqrt(-2.0f * std::log(uniform(1e-6f, 1.0f)));
    return radius * std::cos(6.2831853f * uniform(0.0f, 1.0f));
  }

 private:
  Philox philox_;
};

}  // namespace zipcache::cuda
