#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "random_contents.h"

namespace zipcache::cuda {
namespace {

// to[n] = make(n + an offset of the seed)
template <typename T, typename Make>
__global__ void fill(T* to, std::size_t n, std::uint64_t seed, Make make) {
  const std::size_t stride = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t at = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; at < n; at += stride) {
    to[at] = make(at + seed * 0x9e3779b97f4a7c15ull);
  }
}

__device__ HalfBits device_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

struct Word {
  __device__ std::uint32_t operator()(std::uint64_t x) const { return mix(x); }
};
struct Normal {
  __device__ float operator()(std::uint64_t x) const {
    float sum = 0;
    for (int n = 0; n < 4; ++n) {
      sum += unit_float(x * 4 + n);
    }
    return (sum - 2.0f) * 1.732f;
  }
};
struct NormalHalf {
  __device__ HalfBits operator()(std::uint64_t x) const { return device_half(Normal{}(x)); }
};

struct Classes {
  PageClass of[kMaxClasses];
};
__global__ void fill_page_params(std::uint8_t* pool, const PageEntry* pages, int head_dim,
                                 Classes classes) {
  const PageEntry entry = pages[blockIdx.x];
  const PageClass cls = classes.of[entry.cls];
  const int token = threadIdx.x;
  HalfBits* params = reinterpret_cast<HalfBits*>(pool + std::size_t{entry.unit} * kTileAlignment +
                                                 token / kTileTokens * tile_bytes(head_dim, cls) +
                                                 tile_param_offset(head_dim, cls));
  const float levels = (1 << cls.value_bits) - 1;
  const std::uint64_t x = blockIdx.x * std::uint64_t{kPageTokens} + token;
  const float unit = value_param_unit(cls.value_bits, token % kTileTokens);
  params[scale_index(token % kTileTokens)] =
      device_half((1.0f + 5.0f * unit_float(2 * x)) * 3.0f / levels * unit);
  params[zero_index(token % kTileTokens)] =
      device_half(levels * (0.3f + 0.4f * unit_float(2 * x + 1)) / unit);
}

}  // namespace

void fill_random(void* memory, std::size_t bytes, std::uint64_t seed) {
  fill<<<2048, 256>>>(static_cast<std::uint32_t*>(memory), bytes / 4, seed, Word{});
}
void fill_normal(HalfBits* halves, std::size_t n, std::uint64_t seed) {
  fill<<<2048, 256>>>(halves, n, seed, NormalHalf{});
}
void fill_normal(float* floats, std::size_t n, std::uint64_t seed) {
  fill<<<2048, 256>>>(floats, n, seed, Normal{});
}
void fill_token_params(std::uint8_t* pool, const PageEntry* pages, int n_pages, int head_dim,
                       const PageClass (&classes)[kMaxClasses]) {
  Classes all;
  std::ranges::copy(classes, all.of);
  fill_page_params<<<n_pages, kPageTokens>>>(pool, pages, head_dim, all);
}

}  // namespace zipcache::cuda
