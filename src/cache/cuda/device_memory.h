// Device memory by the ways a cache grows. All are move-free owners; errors are one line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/expected.h"
#include "kernels/cuda/cuda_kernels.h"

namespace zipcache::cuda {

Status to_status(int cuda_error, const char* what);  // cudaError_t

// A range of device addresses that gets memory from its start on, as it is asked for; addresses
// stay.
class AddressRange {
 public:
  AddressRange() = default;
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;

  Status reserve(std::size_t bytes);
  Status ensure(std::size_t bytes);  // mapped at least so far
  void unmap();                      // gives the memory back, keeps the addresses

  std::byte* data() const { return data_; }
  std::size_t reserved_bytes() const { return reserved_; }
  std::size_t mapped_bytes() const { return mapped_; }

 private:
  struct Piece {
    std::uint64_t handle;
    std::size_t offset, bytes;
  };
  std::byte* data_ = nullptr;
  std::size_t reserved_ = 0, mapped_ = 0, granularity_ = 0;
  std::vector<Piece> pieces_;
};

// Scratch: contents are lost when it grows; new memory is zero.
class DeviceArray {
 public:
  DeviceArray() = default;
  ~DeviceArray();
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  Status ensure(std::size_t bytes, Stream stream);  // waits for the stream when it grows
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }
  void release();

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// The same number of bytes for each of some layers; contents stay when it grows.
class LayeredArray {
 public:
  void set_layers(std::size_t n_layers) { n_layers_ = n_layers; }
  ~LayeredArray();
  // `headroom`: growing again soon costs a copy.
  Status ensure(std::size_t bytes_per_layer, bool headroom, Stream stream);
  template <typename T>
  T* layer(std::size_t index) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + index * per_layer_);
  }
  std::size_t stride_bytes() const { return per_layer_; }
  std::size_t bytes() const { return n_layers_ * per_layer_; }

 private:
  void* data_ = nullptr;
  std::size_t n_layers_ = 0, per_layer_ = 0;
};

// Host memory that copies to and from the device do not wait for.
class PinnedArray {
 public:
  PinnedArray() = default;
  ~PinnedArray();
  PinnedArray(const PinnedArray&) = delete;
  PinnedArray& operator=(const PinnedArray&) = delete;
  // Waits for the copies that in_use() was told of.
  Status ensure(std::size_t bytes);
  // The work so far in `stream` reads or writes it.
  Status in_use(Stream stream);
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
  void* done_ = nullptr;  // cudaEvent_t
};

}  // namespace zipcache::cuda
