// What the memory gives: a kernel that reads and one that copies.
#include "cuda_bench.h"
#include "device_memory.h"
#include "random_contents.h"

namespace zipcache::cuda {
namespace {

constexpr int kThreads = 512, kUnroll = 8;

// Loads of one thread in flight together, each handed to `use`.
template <typename Use>
__device__ __forceinline__ void stream(const uint4* from, std::size_t n, Use use) {
  const std::size_t stride = std::size_t{gridDim.x} * kThreads;
  for (std::size_t at = blockIdx.x * std::size_t{kThreads} + threadIdx.x; at < n;
       at += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u * stride < n) {
        v[u] = __ldcs(from + at + u * stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u * stride < n) {
        use(at + u * stride, v[u]);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* from, std::size_t n, std::uint32_t* sink) {
  std::uint32_t sum = 0;
  stream(from, n, [&](std::size_t, const uint4& v) { sum += v.x ^ v.y ^ v.z ^ v.w; });
  if (sum == 0x12345678u) {
    *sink = sum;
  }
}
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const uint4* from, uint4* to, std::size_t n) {
  stream(from, n, [&](std::size_t at, const uint4& v) { __stcs(to + at, v); });
}

int n_sms() {
  int n = 0;
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, 0);
  return n;
}
void launch_read(const std::uint8_t* from, std::size_t bytes, int blocks_per_sm,
                 std::uint32_t* sink, cudaStream_t stream) {
  read_kernel<<<n_sms() * blocks_per_sm, kThreads, 0, stream>>>(
      reinterpret_cast<const uint4*>(from), bytes / sizeof(uint4), sink);
}

constexpr std::size_t kFlushBytes = std::size_t{128} << 20;  // an H200's L2 cache has 50 MB

}  // namespace

CacheFlush::CacheFlush() : memory_(kFlushBytes), sink_(1) {
  fill_random(memory_.data(), kFlushBytes, 7);
}
void CacheFlush::launch(cudaStream_t stream) const {
  launch_read(memory_.data(), kFlushBytes, 2, sink_.data(), stream);
}

void bench_ceilings(Report& report, int n_samples) {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  const DeviceBuffer<std::uint8_t> buffer(4 * kBytes);
  const DeviceBuffer<std::uint32_t> sink(1);
  fill_random(buffer.data(), 4 * kBytes, 1);
  const auto at = [&](std::size_t byte) { return reinterpret_cast<uint4*>(buffer.data() + byte); };
  const auto read = [&](std::size_t bytes, int blocks_per_sm) {
    return time_graph(int(4 * kBytes / bytes), n_samples, [&](int n, cudaStream_t stream) {
      launch_read(buffer.data() + n * bytes, bytes, blocks_per_sm, sink.data(), stream);
    });
  };
  const Timing few = read(kBytes, 2), many = read(kBytes, 4);
  const Timing best = few.median < many.median ? few : many;
  const Timing copy = time_graph(2, n_samples, [&](int n, cudaStream_t stream) {
    copy_kernel<<<n_sms() * 4, kThreads, 0, stream>>>(at(2 * n * kBytes), at((2 * n + 1) * kBytes),
                                                      kBytes / 16);
  });
  report.read_bytes_per_s = kBytes / best.median;
  report.copy_bytes_per_s = 2 * kBytes / copy.median;
  report.line("read", "1 GiB", kBytes, best);
  report.line("copy", "1 GiB", 2.0 * kBytes, copy);
  // The same for what one launch of a small cache reads: what starting and ending a kernel costs.
  for (const std::size_t mib : {28, 112, 224}) {
    report.line("read", std::to_string(mib) + " MiB", mib << 20, read(mib << 20, 2));
  }
}

}  // namespace zipcache::cuda
