// Quantize and pack: fp16 keys and values of a prompt or of a full tail become device pages.
//
//   find_ranges    per (head, slab of slots): channel minima and maxima of keys per scale set, the
//                  largest |value| per channel; slabs meet in atomic maxima, which no order can
//                  change
//   finish_params  per (head, channel): fp16 scale and minimum per scale set, channel factors
//   pack_tiles     one warp per tile and tensor: codes in registers, words in the order of
//                  device_page.h
//
// The arithmetic is that of quant/grid.cc: parameters are rounded first and codes follow from the
// rounded ones, half to even, clamped.
#include <cuda_runtime.h>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack_words.cuh"
#include "kernels/cuda/ptx.cuh"

namespace zipcache::cuda {
namespace {

constexpr int kSlabSlots = 512;
constexpr int kRangeThreads = 256;
constexpr int kMaxHeadDim = 256;
constexpr int kPackWarps = 4;
constexpr float kLargestHalf = 65504.0f;

// Floats as unsigned integers of the same order.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float(bits >> 31 != 0 ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ float finite(float x) {
  return isnan(x) ? 0.0f : fminf(fmaxf(x, -kLargestHalf), kLargestHalf);
}
// x / divisor, correctly rounded as a division is, from inverse = 1 / divisor: one instruction more
// than a product instead of ten.
__device__ __forceinline__ float quotient(float x, float divisor, float inverse) {
  const float near = x * inverse;
  return fmaf(fmaf(-near, divisor, x), inverse, near);
}
__device__ __forceinline__ float rounded_half(float x) {
  return ptx::low_half(ptx::pack_half2(fminf(fmaxf(x, -kLargestHalf), kLargestHalf), 0));
}

__device__ __forceinline__ int class_of_slot(const PackParams& p, int slot) {
  int cls = 0, end = p.class_tokens[0];
  while (slot >= end && cls + 1 < p.n_classes) {
    end += p.class_tokens[++cls];
  }
  return cls;
}
__device__ __forceinline__ int64_t token_of_slot(const PackParams& p, int head, int slot) {
  return p.order == nullptr ? slot
                            : __ldg(p.order + static_cast<int64_t>(head) * p.n_tokens + slot);
}

// Workspace: [n_kv_heads, n_key_sets, 2 (max, max of the negative), head_dim], then
// [n_kv_heads, head_dim] of the largest |value|. Zero is below every ordered() value.
__device__ __forceinline__ uint32_t* key_extremes(const PackParams& p, int head, int set) {
  return p.workspace + (static_cast<int64_t>(head) * p.n_key_sets + set) * 2 * p.head_dim;
}
__device__ __forceinline__ uint32_t* value_extremes(const PackParams& p, int head) {
  return p.workspace + static_cast<int64_t>(p.n_kv_heads) * p.n_key_sets * 2 * p.head_dim +
         static_cast<int64_t>(head) * p.head_dim;
}

// Threads: (head_dim / 8) column groups x rows of the block; each thread has 8 channels. The block
// meets in shared memory first: one atomic per channel and block on global memory.
__global__ void __launch_bounds__(kRangeThreads) find_ranges(const __grid_constant__ PackParams p) {
  // [n_key_sets][2][head_dim], then [head_dim]; as in the workspace, of this head.
  __shared__ uint32_t extremes[(2 * kMaxKeySets + 1) * kMaxHeadDim];
  const int head = blockIdx.y;
  const int columns = p.head_dim / 8;
  const int column = threadIdx.x % columns, row = threadIdx.x / columns,
            rows = kRangeThreads / columns;
  const int begin = blockIdx.x * kSlabSlots, end = min(begin + kSlabSlots, p.n_tokens);
  const int n_key_words = p.n_key_sets * 2 * p.head_dim;
  for (int n = threadIdx.x; n < n_key_words + p.head_dim; n += kRangeThreads) {
    extremes[n] = 0;
  }
  __syncthreads();

  float high[8], negative_low[8], magnitude[8];
  int set = -1;
  const auto reset = [&] {
    for (int c = 0; c < 8; ++c) {
      high[c] = negative_low[c] = -INFINITY;
    }
  };
  const auto flush = [&] {
    if (set >= 0) {
      uint32_t* to = extremes + set * 2 * p.head_dim + column * 8;
      for (int c = 0; c < 8; ++c) {
        atomicMax(to + c, ordered(high[c]));
        atomicMax(to + p.head_dim + c, ordered(negative_low[c]));
      }
    }
    reset();
  };
  reset();
  for (int c = 0; c < 8; ++c) {
    magnitude[c] = 0;
  }
  constexpr int kBatch = 4;  // slots whose loads are under way together
  for (int first = begin + row; first < end; first += rows * kBatch) {
    uint4 k[kBatch], v[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int slot = min(first + n * rows, end - 1);  // twice the last: no other maximum
      const int64_t at =
          token_of_slot(p, head, slot) * p.token_stride + head * p.head_dim + column * 8;
      k[n] = __ldg(reinterpret_cast<const uint4*>(p.k + at));
      v[n] = __ldg(reinterpret_cast<const uint4*>(p.v + at));
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int slot_set = p.key_set[class_of_slot(p, min(first + n * rows, end - 1))];
      if (slot_set != set) {
        flush();
        set = slot_set;
      }
      const uint32_t keys[4] = {k[n].x, k[n].y, k[n].z, k[n].w},
                     values[4] = {v[n].x, v[n].y, v[n].z, v[n].w};
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float key =
            finite(c % 2 == 0 ? ptx::low_half(keys[c / 2]) : ptx::high_half(keys[c / 2]));
        const float value =
            finite(c % 2 == 0 ? ptx::low_half(values[c / 2]) : ptx::high_half(values[c / 2]));
        high[c] = fmaxf(high[c], key);
        negative_low[c] = fmaxf(negative_low[c], -key);
        magnitude[c] = fmaxf(magnitude[c], fabsf(value));
      }
    }
  }
  flush();
  for (int c = 0; c < 8; ++c) {
    atomicMax(extremes + n_key_words + column * 8 + c, ordered(magnitude[c]));
  }
  __syncthreads();
  const int n_words = n_key_words + (p.keep_factors ? 0 : p.head_dim);
  for (int n = threadIdx.x; n < n_words; n += kRangeThreads) {
    if (extremes[n] != 0) {
      atomicMax(n < n_key_words ? key_extremes(p, head, 0) + n
                                : value_extremes(p, head) + n - n_key_words,
                extremes[n]);
    }
  }
}

// One block per head, one thread per channel.
__global__ void finish_params(const __grid_constant__ PackParams p) {
  const int head = blockIdx.x, channel = threadIdx.x;
  for (int set = 0; set < p.n_key_sets; ++set) {
    int cls = 0;  // all classes of a set have one key width and clip
    while (cls + 1 < p.n_classes && p.key_set[cls] != set) {
      ++cls;
    }
    const uint32_t* from = key_extremes(p, head, set) + channel;
    float scale = 1, low = 0;
    if (from[0] != 0) {  // the set has tokens
      const float max = from_ordered(from[0]), min = -from_ordered(from[p.head_dim]);
      const float margin = (max - min) * ((1.0f - p.key_clip[cls]) * 0.5f);
      low = min + margin;
      scale = rounded_half(((max - margin) - low) / ((1 << p.classes[cls].key_bits) - 1));
      scale = scale > 0 ? scale : 1.0f;
    }
    HalfBits* to = p.key_sets + (static_cast<int64_t>(head) * p.n_key_sets + set) * 2 * p.head_dim;
    to[channel] = static_cast<HalfBits>(ptx::pack_half2(scale, 0));
    to[p.head_dim + channel] = static_cast<HalfBits>(ptx::pack_half2(rounded_half(low), 0));
  }
  if (p.keep_factors) {
    return;
  }

  // C_c = sqrt(max |v|), times the power of two that puts the largest possible token scale of a
  // 2-bit class, 2/3 of the largest C_c, into [4, 8): small enough for weights in fp16, large
  // enough that small weights do not vanish there.
  __shared__ float largest[kWarpLanes];
  const uint32_t bits = value_extremes(p, head)[channel];
  const float root = bits != 0 ? sqrtf(from_ordered(bits)) : 0.0f;
  float of_warp = root;
  for (int offset = 16; offset > 0; offset /= 2) {
    of_warp = fmaxf(of_warp, __shfl_xor_sync(ptx::kFullWarp, of_warp, offset));
  }
  if (channel % kWarpLanes == 0) {
    largest[channel / kWarpLanes] = of_warp;
  }
  __syncthreads();
  float bound = 0;
  for (int warp = 0; warp < p.head_dim / kWarpLanes; ++warp) {
    bound = fmaxf(bound, largest[warp]);
  }
  const int exponent = bound > 0 ? (__float_as_int(bound * (2.0f / 3.0f)) >> 23) - 127 - 2 : 0;
  const float factor = rounded_half(root);
  p.value_factors[static_cast<int64_t>(head) * p.head_dim + channel] =
      ldexpf(factor > 0 ? factor : 1.0f, exponent);
}

// 8 channels of a slot of a head: fp16 as it lies in memory; zeros for an unused slot.
__device__ __forceinline__ uint4 load_channels(const HalfBits* base, int64_t at, bool used) {
  return used ? __ldg(reinterpret_cast<const uint4*>(base + at)) : uint4{0, 0, 0, 0};
}
__device__ __forceinline__ void to_floats(const uint4& halves, float (&x)[8]) {
  const uint32_t pairs[4] = {halves.x, halves.y, halves.z, halves.w};
  uint32_t carries = 0;  // bits 15, 31: an exponent of all ones
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    x[pair * 2] = ptx::low_half(pairs[pair]);
    x[pair * 2 + 1] = ptx::high_half(pairs[pair]);
    carries |= (pairs[pair] & 0x7c007c00u) + 0x04000400u;
  }
  if ((carries & 0x80008000u) != 0) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      x[c] = finite(x[c]);
    }
  }
}

// `steps` from the lowest level on, rounded half to even and clamped: adding 1.5 * 2^23 rounds to
// an integer and leaves it in the low bits, without a conversion.
template <int kBits>
__device__ __forceinline__ uint32_t code_of(float steps) {
  constexpr uint32_t kLevels = (1 << kBits) - 1;
  const float clamped = fminf(fmaxf(steps, 0.0f), static_cast<float>(kLevels));
  return __float_as_uint(clamped + 12582912.0f) & kLevels;
}

template <int kHeadDim, int kBits>
__device__ __forceinline__ void pack_keys(const PackParams& p, const int64_t (&rows)[4],
                                          const bool (&used)[4], const HalfBits* set, int lane,
                                          uint8_t* tile) {
  constexpr int kBatch = 2;  // chunks whose loads are under way together
  const int first = (lane & 3) * 8;
#pragma unroll 1
  for (int batch = 0; batch < kHeadDim / 32; batch += kBatch) {
    uint4 keys[kBatch][4];
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {  // tokens g + 8n
        keys[c][n] = load_channels(p.k, rows[n] + (batch + c) * 32 + first, used[n]);
      }
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      const int chunk = batch + c;
      float scale[8], inverse[8], low[8];
      to_floats(load_channels(set, chunk * 32 + first, true), scale);
      to_floats(load_channels(set + kHeadDim, chunk * 32 + first, true), low);
#pragma unroll
      for (int channel = 0; channel < 8; ++channel) {
        inverse[channel] = 1.0f / scale[channel];
      }
      uint32_t codes[4][8];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float x[8];
        to_floats(keys[c][n], x);
#pragma unroll
        for (int channel = 0; channel < 8; ++channel) {
          const uint32_t code =
              code_of<kBits>(quotient(x[channel] - low[channel], scale[channel], inverse[channel]));
          codes[n][channel] = used[n] ? code : 0u;
        }
      }
      store_key_words<kHeadDim, kBits>(tile, lane, chunk, codes);
    }
  }
}

template <int kHeadDim, int kBits>
__device__ __forceinline__ void pack_values(const PackParams& p, const int64_t (&rows)[8],
                                            const bool (&used)[8], const float* factors, float clip,
                                            int lane, uint8_t* codes_at, HalfBits* params) {
  constexpr float kLevels = (1 << kBits) - 1;
  const int first = (lane >> 2) * 8;
  // Calls use(token, x) for the lane's tokens with its 8 channels of `part`, divided by their
  // factors. Keeping the values from one pass to the next was slower: 64 registers.
  const auto for_tokens = [&](int part, auto use) {
    uint4 raw[8];
#pragma unroll
    for (int token = 0; token < 8; ++token) {
      raw[token] = load_channels(p.v, rows[token] + part * 64 + first, used[token]);
    }
    float factor[8], inverse[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      factor[c] = __ldg(factors + part * 64 + first + c);
      inverse[c] = 1.0f / factor[c];
    }
#pragma unroll
    for (int token = 0; token < 8; ++token) {
      float x[8];
      to_floats(raw[token], x);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        x[c] = quotient(x[c], factor[c], inverse[c]);
      }
      use(token, x);
    }
  };

  // Ranges of the lane's 8 tokens over all channels: its own, then the 8 lanes that share the
  // tokens.
  float scale[8], low[8], largest[8], least[8];
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    largest[token] = -INFINITY, least[token] = INFINITY;
  }
#pragma unroll 1
  for (int part = 0; part < kHeadDim / 64; ++part) {
    for_tokens(part, [&](int token, const float(&x)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        largest[token] = fmaxf(largest[token], x[c]);
        least[token] = fminf(least[token], x[c]);
      }
    });
  }
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    float max = largest[token], min = least[token];
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      max = fmaxf(max, __shfl_xor_sync(ptx::kFullWarp, max, offset));
      min = fminf(min, __shfl_xor_sync(ptx::kFullWarp, min, offset));
    }
    const float margin = (max - min) * ((1.0f - clip) * 0.5f);
    low[token] = min + margin;
    scale[token] = rounded_half(fminf(((max - margin) - low[token]) / kLevels, 127.0f));
    const bool flat = !(scale[token] > 0);
    scale[token] = flat ? 1.0f : scale[token];
    const float zero = rounded_half(-low[token] / scale[token]);
    low[token] = __fmul_rn(-zero, scale[token]);  // no contraction: testable to the bit
    if (lane < 4) {
      // Tokens of lane i: 2i, 2i+1, 2i+8, 2i+9, and those + 16.
      const int t = token / 4 * 16 + token / 2 % 2 * 8 + lane * 2 + token % 2;
      params[scale_index(t)] =
          static_cast<HalfBits>(ptx::pack_half2(used[token] ? scale[token] : 0, 0));
      params[zero_index(t)] = static_cast<HalfBits>(ptx::pack_half2(used[token] ? zero : 0, 0));
    }
  }
#pragma unroll 1
  for (int part = 0; part < kHeadDim / 64; ++part) {
    uint32_t codes[8][8];  // [token][channel]; 0 for an unused token, which is all zeros
    for_tokens(part, [&](int token, const float(&x)[8]) {
      const float inverse = 1.0f / scale[token];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        codes[token][c] = code_of<kBits>(quotient(x[c] - low[token], scale[token], inverse));
      }
    });
    store_value_words<kHeadDim, kBits>(codes_at, lane, part, codes);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kPackWarps* kWarpLanes, 3)
    pack_tiles(const __grid_constant__ PackParams p, int n_pages, int n_blocks) {
  const int lane = threadIdx.x % kWarpLanes;
  // Keys first, then values: blocks that run together should run the same instructions, which do
  // not all fit in the instruction cache.
  const bool packs_keys = static_cast<int>(blockIdx.x) < n_blocks;
  const int tile_index =
      (packs_keys ? blockIdx.x : blockIdx.x - n_blocks) * kPackWarps + threadIdx.x / kWarpLanes;
  const int head = blockIdx.y;
  const int page = tile_index / kTilesPerPage;
  if (page >= n_pages) {
    return;
  }
  // Which slots: pages stand in class order, each class from a fresh page on.
  const PageEntry entry = p.pages[static_cast<int64_t>(head) * n_pages + page];
  const PageClass cls = p.classes[entry.cls];
  int first_page = 0, first_slot = 0;
  for (int c = 0; c < entry.cls; ++c) {
    first_page += (p.class_tokens[c] + kPageTokens - 1) / kPageTokens;
    first_slot += p.class_tokens[c];
  }
  const int tile = tile_index % kTilesPerPage;
  const int in_class = (page - first_page) * kPageTokens + tile * kTileTokens;
  const int n_used = min(max(p.class_tokens[entry.cls] - in_class, 0), kTileTokens);
  const int begin = first_slot + in_class;

  const int bytes = tile_bytes(kHeadDim, cls.key_bits, cls.value_bits);
  uint8_t* to = p.pool + static_cast<uint64_t>(entry.unit) * kTileAlignment + tile * bytes;
  const auto start_of = [&](int token, bool used) {
    return used ? token_of_slot(p, head, begin + token) * p.token_stride +
                      static_cast<int64_t>(head) * kHeadDim
                : 0;
  };

  if (packs_keys) {
    int64_t rows[4];
    bool used[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int token = n * 8 + (lane >> 2);
      used[n] = token < n_used;
      rows[n] = start_of(token, used[n]);
    }
    const HalfBits* set =
        p.key_sets +
        (static_cast<int64_t>(head) * p.n_key_sets + p.key_set[entry.cls]) * 2 * kHeadDim;
    switch (cls.key_bits) {
      case 2:
        pack_keys<kHeadDim, 2>(p, rows, used, set, lane, to);
        break;
      case 3:
        pack_keys<kHeadDim, 3>(p, rows, used, set, lane, to);
        break;
      case 4:
        pack_keys<kHeadDim, 4>(p, rows, used, set, lane, to);
        break;
      default:
        pack_keys<kHeadDim, 8>(p, rows, used, set, lane, to);
        break;
    }
    return;
  }

  int64_t rows[8];
  bool used[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int token = n / 4 * 16 + n / 2 % 2 * 8 + (lane & 3) * 2 + n % 2;
    used[n] = token < n_used;
    rows[n] = start_of(token, used[n]);
  }
  uint8_t* codes = to + tile_value_offset(kHeadDim, cls.key_bits);
  HalfBits* params =
      reinterpret_cast<HalfBits*>(to + tile_param_offset(kHeadDim, cls.key_bits, cls.value_bits));
  const float* factors = p.value_factors + static_cast<int64_t>(head) * kHeadDim;
  const float clip = p.value_clip[entry.cls];
  switch (cls.value_bits) {
    case 2:
      pack_values<kHeadDim, 2>(p, rows, used, factors, clip, lane, codes, params);
      break;
    case 3:
      pack_values<kHeadDim, 3>(p, rows, used, factors, clip, lane, codes, params);
      break;
    case 4:
      pack_values<kHeadDim, 4>(p, rows, used, factors, clip, lane, codes, params);
      break;
    default:
      pack_values<kHeadDim, 8>(p, rows, used, factors, clip, lane, codes, params);
      break;
  }
}

}  // namespace

cudaError_t launch_pack(const PackParams& p, int n_pages, cudaStream_t stream) {
  cudaError_t error =
      cudaMemsetAsync(p.workspace, 0, pack_workspace_words(p) * sizeof(uint32_t), stream);
  if (error != cudaSuccess) {
    return error;
  }
  const dim3 slabs((p.n_tokens + kSlabSlots - 1) / kSlabSlots, p.n_kv_heads);
  error = launch_kernel(find_ranges, slabs, kRangeThreads, 0, stream, p);
  if (error != cudaSuccess) {
    return error;
  }
  error = launch_kernel(finish_params, dim3(p.n_kv_heads), p.head_dim, 0, stream, p);
  if (error != cudaSuccess) {
    return error;
  }
  const int n_blocks = (n_pages * kTilesPerPage + kPackWarps - 1) / kPackWarps;  // of a tensor
  const dim3 tiles(2 * n_blocks, p.n_kv_heads);
  const auto pack_with = [&](auto kernel) {
    return launch_kernel(kernel, tiles, kPackWarps * kWarpLanes, 0, stream, p, n_pages, n_blocks);
  };
  switch (p.head_dim) {
    case 64:
      return pack_with(pack_tiles<64>);
    case 128:
      return pack_with(pack_tiles<128>);
    default:
      return pack_with(pack_tiles<256>);
  }
}

}  // namespace zipcache::cuda
