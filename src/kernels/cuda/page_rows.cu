#include <cuda_runtime.h>

#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/page_rows.h"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int read_code(const uint8_t* tile, const CodePosition& at) {
  const auto field = [&](const BitField& f) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(tile + f.offset);
    return static_cast<int>(word >> f.shift & ((1u << f.bits) - 1));
  };
  return at.high.bits == 0 ? field(at.low) : field(at.low) | field(at.high) << at.low.bits;
}

__device__ __forceinline__ float half_at(const HalfBits* from) { return ptx::low_half(*from); }
__device__ __forceinline__ HalfBits to_half(float x) {
  return static_cast<HalfBits>(ptx::pack_half2(x, 0));
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ UnpackParams p) {
  const int head = blockIdx.x / (p.n_pages / p.n_kv_heads);
  const PageEntry entry = p.pages[blockIdx.x];
  const PageClass cls = p.classes[entry.cls];
  const uint8_t* const page = p.pool + static_cast<int64_t>(entry.unit) * kTileAlignment;
  const HalfBits* const set = p.key_sets + static_cast<int64_t>(entry.set) * 2 * p.head_dim;
  const uint8_t* const order =
      cls.wide_chunks > 0 ? p.key_orders + static_cast<int64_t>(entry.set) * p.head_dim : nullptr;
  const float* const factors = p.value_factors + static_cast<int64_t>(head) * p.head_dim;
  for (int n = threadIdx.x; n < entry.tokens * p.head_dim; n += kThreads) {
    const int slot = n / p.head_dim, channel = n % p.head_dim, token = slot % kTileTokens;
    const int row = p.page_rows[static_cast<int64_t>(blockIdx.x) * kPageTokens + slot];
    if (row < 0 || row < p.first_row || row >= p.end_row) {
      continue;
    }
    const uint8_t* const tile = page + slot / kTileTokens * tile_bytes(p.head_dim, cls);
    const int64_t to = (row - p.first_row) * p.to.token_stride + head * p.to.head_stride;
    if (p.to.k != nullptr) {  // `channel`: as stored
      const int code = read_code(tile, key_position(p.head_dim, cls, token, channel));
      p.to.k[to + (order != nullptr ? order[channel] : channel)] = to_half(
          half_at(set + channel) * static_cast<float>(code) + half_at(set + p.head_dim + channel));
    }
    if (p.to.v != nullptr) {
      const HalfBits* const params =
          reinterpret_cast<const HalfBits*>(tile + tile_param_offset(p.head_dim, cls));
      const int code = read_code(tile + tile_value_offset(p.head_dim, cls),
                                 value_position(p.head_dim, cls.value_bits, token, channel));
      p.to.v[to + channel] =
          to_half(factors[channel] * half_at(params + scale_index(token)) *
                  (static_cast<float>(code) / value_param_unit(cls.value_bits, token) -
                   half_at(params + zero_index(token))));
    }
  }
}

__global__ void __launch_bounds__(kThreads) order_kernel(const __grid_constant__ OrderParams p) {
  const int slot = blockIdx.x * kThreads + threadIdx.x, head = blockIdx.y;
  if (slot < p.n_tokens) {
    p.order[static_cast<int64_t>(head) * p.n_tokens + slot] = p.kept[head * p.kept_stride + slot];
  }
}

template <bool kToFloats>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const __grid_constant__ ConvertParams p) {
  const int64_t token = blockIdx.x;
  const int row = p.n_kv_heads * p.head_dim;
  for (int n = threadIdx.x; n < row; n += kThreads) {
    HalfBits* const half = p.rows.k + token * p.rows.token_stride +
                           n / p.head_dim * p.rows.head_stride + n % p.head_dim;
    float* const full = p.floats + token * row + n;
    if constexpr (kToFloats) {
      *full = half_at(half);
    } else {
      *half = to_half(*full);
    }
  }
}

template <typename Params>
Status run(void (*kernel)(Params), dim3 blocks, const Params& params, Stream stream,
           const char* what) {
  if (blocks.x == 0 || blocks.y == 0) {
    return ok_status();
  }
  const cudaError_t error = launch_kernel(kernel, blocks, kThreads, 0, stream, params);
  return error == cudaSuccess
             ? ok_status()
             : Status(unsupported(std::string("cuda ") + what + ": " + cudaGetErrorString(error)));
}

}  // namespace

Status unpack_pages(const UnpackParams& p, Stream stream) {
  if (p.n_kv_heads < 1 || p.n_pages % p.n_kv_heads != 0) {
    return invalid_argument("cuda unpack: " + std::to_string(p.n_pages) + " pages of " +
                            std::to_string(p.n_kv_heads) + " heads");
  }
  return run(unpack_kernel, dim3(p.n_pages), p, stream, "unpack");
}

Status order_of_ranks(const OrderParams& p, Stream stream) {
  return run(order_kernel, dim3((p.n_tokens + kThreads - 1) / kThreads, p.n_kv_heads), p, stream,
             "order");
}

Status keys_to_floats(const ConvertParams& p, Stream stream) {
  return run(convert_kernel<true>, dim3(p.n_tokens), p, stream, "convert");
}
Status floats_to_keys(const ConvertParams& p, Stream stream) {
  return run(convert_kernel<false>, dim3(p.n_tokens), p, stream, "convert");
}

}  // namespace zipcache::cuda
