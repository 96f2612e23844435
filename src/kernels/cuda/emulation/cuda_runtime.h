// The part of CUDA that this room uses, on the host: its kernels, compiled as C++, run here thread
// by thread, so that the whole test table runs where there is no GPU. What it proves is the logic
// (layouts, masks, barriers' phases, merges, every collective reached by every lane); what it
// cannot prove is speed, memory ordering and the machine's own arithmetic.
//
// Every CUDA thread is a fiber. Fibers of a block take turns in a shuffled order and give way only
// at collectives and barriers, so a lane may run far ahead of the others until something orders
// them: a missing __syncwarp shows as wrong numbers. One warp at a time stands still until the
// others need it, so that a missing __syncthreads shows too. All 32 lanes must come to the same
// collective with the same operation; anything else, and a wait that never ends, is an exception.
// Clusters of blocks run one after the other, in a shuffled order, the blocks of one in turns.
// Found instead of the toolkit's header by the include path.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define ZC_CUDA_EMULATION 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, all threads in one; not in clusters

struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}  // NOLINT
};

namespace zipcache::cuda::emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index thread_index, block_index;  // of the running fiber

// Runs all blocks of a launch to their end, `cluster_blocks` neighbours at the same time.
void run(dim3 grid, dim3 block, unsigned cluster_blocks, std::size_t shared_bytes,
         const std::function<void()>& body);

std::uint8_t* shared_memory();             // of the running block
std::uint8_t* shared_memory_of(int rank);  // of a block of its cluster that has not ended
int cluster_rank();
void cluster_arrive();
void cluster_wait();
void yield();  // lets other fibers run; throws when nothing ever happens
bool block_barrier(bool predicate = false);  // whether any thread came with `true`

enum class Operation { kSync, kShuffle, kVote, kMatrix, kTranspose };

// Leaves `bytes` of this lane's data and returns when all lanes of the warp have: the data of lane
// n is at the result + n * kLaneBytes until the lane's next collective.
inline constexpr std::size_t kLaneBytes = 48;
const std::byte* exchange(Operation operation, const void* data, std::size_t bytes);

template <typename T>
T of_lane(const std::byte* all, int lane) {
  T value;
  std::memcpy(&value, all + static_cast<std::size_t>(lane) * kLaneBytes, sizeof(T));
  return value;
}
template <typename T>
T shuffle(T value, int source) {
  return of_lane<T>(exchange(Operation::kShuffle, &value, sizeof(T)), source & 31);
}

}  // namespace zipcache::cuda::emulation

// --- Device functions ----------------------------------------------------------------------------

#define threadIdx (zipcache::cuda::emulation::thread_index)
#define blockIdx (zipcache::cuda::emulation::block_index)

using std::isnan;
using std::max;
using std::min;

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return zipcache::cuda::emulation::shuffle(value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return zipcache::cuda::emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline bool __any_sync(unsigned, bool predicate) {
  namespace emulation = zipcache::cuda::emulation;
  const std::byte* all = emulation::exchange(emulation::Operation::kVote, &predicate, 1);
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) {
    any |= emulation::of_lane<bool>(all, lane);
  }
  return any;
}
inline void __syncwarp() {
  namespace emulation = zipcache::cuda::emulation;
  emulation::exchange(emulation::Operation::kSync, nullptr, 0);
}
inline void __syncthreads() { zipcache::cuda::emulation::block_barrier(); }
inline int __syncthreads_or(int predicate) {
  return zipcache::cuda::emulation::block_barrier(predicate != 0) ? 1 : 0;
}
inline int __syncthreads_count(int predicate) {
  static int count = 0;  // one block at a time
  __syncthreads();
  if (threadIdx.x == 0) {
    count = 0;
  }
  __syncthreads();
  count += predicate != 0 ? 1 : 0;
  __syncthreads();
  return count;
}
inline void __threadfence() {}

inline std::uint32_t atomicAdd(std::uint32_t* p, std::uint32_t x) {
  return std::exchange(*p, *p + x);
}
inline std::uint32_t atomicMax(std::uint32_t* p, std::uint32_t x) {
  return std::exchange(*p, std::max(*p, x));
}

template <typename To, typename From>
To zc_bit_cast(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline int __float_as_int(float x) { return zc_bit_cast<int>(x); }
inline std::uint32_t __float_as_uint(float x) { return zc_bit_cast<std::uint32_t>(x); }
inline float __int_as_float(int x) { return zc_bit_cast<float>(x); }
inline float __uint_as_float(std::uint32_t x) { return zc_bit_cast<float>(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline int __float2int_rn(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::lrint(x)); }
inline std::uint32_t __byte_perm(std::uint32_t x, std::uint32_t y, std::uint32_t selector) {
  const std::uint64_t both = x | static_cast<std::uint64_t>(y) << 32;
  std::uint32_t out = 0;
  for (int n = 0; n < 4; ++n) {
    out |= static_cast<std::uint32_t>(both >> 8 * (selector >> 4 * n & 7) & 0xff) << 8 * n;
  }
  return out;
}

// --- Runtime -------------------------------------------------------------------------------------

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t zc_cuda_malloc(void** p, std::size_t bytes);
template <typename T>
cudaError_t cudaMalloc(T** p, std::size_t bytes) {
  return zc_cuda_malloc(reinterpret_cast<void**>(p), bytes);
}
cudaError_t cudaFree(void* p);
inline cudaError_t cudaMemset(void* p, int byte, std::size_t bytes) {
  return std::memset(p, byte, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int byte, std::size_t bytes, cudaStream_t) {
  return cudaMemset(p, byte, bytes);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) {
    std::memcpy(to, from, bytes);
  }
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  return *blocks = 4, cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeClusterSchedulingPolicyPreference,
};
enum cudaClusterSchedulingPolicy { cudaClusterSchedulingPolicyLoadBalancing };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    dim3 clusterDim;
    cudaClusterSchedulingPolicy clusterSchedulingPolicyPreference;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... arguments) {
  const std::tuple<Expected...> values(std::forward<Actual>(arguments)...);
  unsigned cluster_blocks = 1;
  for (unsigned n = 0; n < config->numAttrs; ++n) {
    if (config->attrs[n].id == cudaLaunchAttributeClusterDimension) {
      cluster_blocks = config->attrs[n].val.clusterDim.x;
    }
  }
  zipcache::cuda::emulation::run(config->gridDim, config->blockDim, cluster_blocks,
                                 config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  return *clusters = 6, cudaSuccess;  // all blocks that run at once
}
