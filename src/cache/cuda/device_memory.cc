#include "cache/cuda/device_memory.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

namespace zipcache::cuda {
namespace {

constexpr std::size_t kMapBytes = std::size_t{8} << 20;
constexpr std::size_t kMaxSlackBytes = std::size_t{1} << 20;  // of scratch

// The driver's functions by the runtime, so that nothing links to the driver's library.
struct Driver {
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  bool complete = false;
};

template <typename Function>
bool find(const char* name, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  *function = reinterpret_cast<Function>(found);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess && found != nullptr;
}

const Driver& driver() {
  static const Driver kDriver = [] {
    Driver d;
    d.complete = find("cuMemAddressReserve", &d.reserve) && find("cuMemAddressFree", &d.free) &&
                 find("cuMemCreate", &d.create) && find("cuMemRelease", &d.release) &&
                 find("cuMemMap", &d.map) && find("cuMemUnmap", &d.unmap) &&
                 find("cuMemSetAccess", &d.set_access) &&
                 find("cuMemGetAllocationGranularity", &d.granularity);
    return d;
  }();
  return kDriver;
}

CUmemAllocationProp properties() {
  CUmemAllocationProp properties{};
  int device = 0;
  cudaGetDevice(&device);
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
  return properties;
}

Status driver_status(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) {
    return ok_status();
  }
  const std::string message =
      std::string("cuda ") + what + ": driver error " + std::to_string(result);
  return result == CUDA_ERROR_OUT_OF_MEMORY ? out_of_memory(message) : unsupported(message);
}

std::size_t round_up(std::size_t n, std::size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace

Status to_status(int cuda_error, const char* what) {
  const auto error = static_cast<cudaError_t>(cuda_error);
  if (error == cudaSuccess) {
    return ok_status();
  }
  const std::string message = std::string("cuda ") + what + ": " + cudaGetErrorString(error);
  return error == cudaErrorMemoryAllocation ? out_of_memory(message) : unsupported(message);
}

Status AddressRange::reserve(std::size_t bytes) {
  if (!driver().complete) {
    return unsupported("cuda: this driver has no virtual memory management");
  }
  cudaFree(nullptr);  // makes the context current
  const CUmemAllocationProp wanted = properties();
  if (Status ok = driver_status(
          driver().granularity(&granularity_, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
          "granularity");
      !ok) {
    return ok;
  }
  reserved_ = round_up(std::max<std::size_t>(bytes, 1), granularity_);
  CUdeviceptr at = 0;
  if (Status ok = driver_status(driver().reserve(&at, reserved_, 0, 0, 0), "address range"); !ok) {
    reserved_ = 0;
    return ok;
  }
  data_ = reinterpret_cast<std::byte*>(at);
  return ok_status();
}

Status AddressRange::ensure(std::size_t bytes) {
  if (bytes <= mapped_) {
    return ok_status();
  }
  if (bytes > reserved_) {
    return out_of_memory("cuda: " + std::to_string(bytes) + " bytes wanted in a range of " +
                         std::to_string(reserved_));
  }
  const std::size_t end = std::min(round_up(bytes, std::max(kMapBytes, granularity_)), reserved_);
  const std::size_t size = end - mapped_;
  const CUmemAllocationProp wanted = properties();
  CUmemGenericAllocationHandle handle = 0;
  if (Status ok = driver_status(driver().create(&handle, size, &wanted, 0), "memory"); !ok) {
    return ok;
  }
  const auto at = reinterpret_cast<CUdeviceptr>(data_) + mapped_;
  Status ok = driver_status(driver().map(at, size, 0, handle, 0), "map");
  if (ok) {
    CUmemAccessDesc access{};
    access.location = wanted.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    ok = driver_status(driver().set_access(at, size, &access, 1), "access");
    if (!ok) {
      driver().unmap(at, size);
    }
  }
  if (!ok) {
    driver().release(handle);
    return ok;
  }
  pieces_.push_back({handle, mapped_, size});
  mapped_ = end;
  return ok_status();
}

void AddressRange::unmap() {
  for (const Piece& piece : pieces_) {
    driver().unmap(reinterpret_cast<CUdeviceptr>(data_) + piece.offset, piece.bytes);
    driver().release(piece.handle);
  }
  pieces_.clear();
  mapped_ = 0;
}

AddressRange::~AddressRange() {
  if (data_ != nullptr) {
    cudaDeviceSynchronize();
    unmap();
    driver().free(reinterpret_cast<CUdeviceptr>(data_), reserved_);
  }
}

void DeviceArray::release() {
  cudaFree(data_);
  data_ = nullptr;
  bytes_ = 0;
}

DeviceArray::~DeviceArray() { release(); }

Status DeviceArray::ensure(std::size_t bytes, Stream stream) {
  if (bytes <= bytes_) {
    return ok_status();
  }
  cudaStreamSynchronize(stream);
  release();
  const std::size_t size = round_up(bytes + std::min(bytes / 4, kMaxSlackBytes), 256);
  if (Status ok = to_status(cudaMalloc(&data_, size), "scratch"); !ok) {
    return ok;
  }
  bytes_ = size;
  return to_status(cudaMemsetAsync(data_, 0, size, stream), "scratch");
}

LayeredArray::~LayeredArray() { cudaFree(data_); }

Status LayeredArray::ensure(std::size_t bytes_per_layer, bool headroom, Stream stream) {
  if (bytes_per_layer <= per_layer_) {
    return ok_status();
  }
  const std::size_t wanted =
      round_up(headroom ? bytes_per_layer + bytes_per_layer / 8 : bytes_per_layer, 256);
  void* grown = nullptr;
  if (Status ok = to_status(cudaMalloc(&grown, wanted * n_layers_), "memory"); !ok) {
    return ok;
  }
  Status ok = to_status(cudaMemsetAsync(grown, 0, wanted * n_layers_, stream), "memory");
  if (ok && per_layer_ > 0) {
    ok = to_status(cudaMemcpy2DAsync(grown, wanted, data_, per_layer_, per_layer_, n_layers_,
                                     cudaMemcpyDeviceToDevice, stream),
                   "growing");
  }
  cudaStreamSynchronize(stream);
  if (!ok) {
    cudaFree(grown);
    return ok;
  }
  cudaFree(data_);
  data_ = grown;
  per_layer_ = wanted;
  return ok_status();
}

PinnedArray::~PinnedArray() {
  if (done_ != nullptr) {
    cudaEventSynchronize(static_cast<cudaEvent_t>(done_));
    cudaEventDestroy(static_cast<cudaEvent_t>(done_));
  }
  cudaFreeHost(data_);
}

Status PinnedArray::in_use(Stream stream) {
  if (done_ == nullptr) {
    cudaEvent_t event = nullptr;
    if (Status ok = to_status(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
        !ok) {
      return ok;
    }
    done_ = event;
  }
  return to_status(cudaEventRecord(static_cast<cudaEvent_t>(done_), stream), "event");
}

Status PinnedArray::ensure(std::size_t bytes) {
  if (done_ != nullptr) {
    if (Status ok = to_status(cudaEventSynchronize(static_cast<cudaEvent_t>(done_)), "copies");
        !ok) {
      return ok;
    }
  }
  if (bytes <= bytes_) {
    return ok_status();
  }
  cudaFreeHost(data_);
  data_ = nullptr;
  bytes_ = 0;
  const std::size_t size = round_up(bytes + bytes / 2, 4096);
  if (Status ok = to_status(cudaMallocHost(&data_, size), "pinned memory"); !ok) {
    return ok;
  }
  bytes_ = size;
  return ok_status();
}

}  // namespace zipcache::cuda
