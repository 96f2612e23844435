// Quantize and pack: fp16 keys and values of a prompt or of a full tail become device pages.
//
//   find_ranges    per (head, slab of slots): channel minima and maxima of keys per scale set, the
//                  largest |value| per channel; slabs meet in atomic maxima, which no order can
//                  change
//   finish_params  per (head, channel): which channels of keys are wide and where channels are
//                  stored, fp16 scale and minimum per scale set, channel factors
//   pack_tiles     one warp per tile and tensor: codes in registers, words in the order of
//                  device_page.h; keys with wide channels pass through shared memory for theirs
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
__global__ void __launch_bounds__(kRangeThreads)
    find_ranges(const __grid_constant__ Batch<PackParams> batch) {
  const PackParams& p = batch.of[blockIdx.z];
  // [n_key_sets][2][head_dim], then [head_dim]; as in the workspace, of this head.
  __shared__ uint32_t extremes[(2 * kMaxKeySets + 1) * kMaxHeadDim];
  ptx::let_next_launch_start();
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
      v[n] = p.keep_factors ? uint4{0, 0, 0, 0} : __ldg(reinterpret_cast<const uint4*>(p.v + at));
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

// Where a channel of keys is stored, if there are wide ones.
struct StoredChannel {
  int position = 0;
  bool is_wide = false;
};
// All threads of the block call this, one per channel; `errors` and `wide`: shared, head_dim each.
__device__ __forceinline__ StoredChannel place_channel(const PackParams& p, int head, int channel,
                                                       int n_wide, float* errors, int* wide) {
  float max = -INFINITY, min = INFINITY;
  for (int set = 0; set < p.n_key_sets; ++set) {
    const uint32_t* from = key_extremes(p, head, set) + channel;
    if (from[0] != 0) {
      max = fmaxf(max, from_ordered(from[0]));
      min = fminf(min, -from_ordered(from[p.head_dim]));
    }
  }
  const float range = fminf(max - min, kLargestHalf);
  float error = range * range;
  if (p.query_power != nullptr) {
    error *= __ldg(p.query_power + static_cast<int64_t>(head) * p.head_dim + channel);
  }
  error = isnan(error) ? 0.0f : error;
  errors[channel] = error;
  __syncthreads();
  int rank = 0;
  for (int other = 0; other < p.head_dim; ++other) {
    rank += errors[other] > error || (errors[other] == error && other < channel) ? 1 : 0;
  }
  StoredChannel at;
  at.is_wide = rank < n_wide;
  wide[channel] = at.is_wide ? 1 : 0;
  __syncthreads();
  int n_wide_before = 0;
  for (int other = 0; other < channel; ++other) {
    n_wide_before += wide[other];
  }
  at.position = at.is_wide ? n_wide_before : n_wide + channel - n_wide_before;
  return at;
}

// One block per head, one thread per channel.
__global__ void finish_params(const __grid_constant__ Batch<PackParams> batch) {
  const PackParams& p = batch.of[blockIdx.z];
  __shared__ float errors[kMaxHeadDim];
  __shared__ int wide[kMaxHeadDim];
  ptx::let_next_launch_start();
  ptx::wait_for_launch_before();
  const int head = blockIdx.x, channel = threadIdx.x;
  int n_wide = 0;
  for (int cls = 0; cls < p.n_classes; ++cls) {
    n_wide = max(n_wide, p.classes[cls].wide_chunks * kChunkChannels);
  }
  const StoredChannel stored =
      n_wide > 0 ? place_channel(p, head, channel, n_wide, errors, wide) : StoredChannel{};
  for (int set = 0; set < p.n_key_sets; ++set) {
    int cls = 0;  // all classes of a set have one width of keys and clip
    while (cls + 1 < p.n_classes && p.key_set[cls] != set) {
      ++cls;
    }
    const bool has_order = p.classes[cls].wide_chunks > 0;
    const int bits = has_order && stored.is_wide ? kWideBits : p.classes[cls].key_bits;
    const float clip = stored.is_wide ? p.wide_clip : p.key_clip[cls];
    uint32_t* from = key_extremes(p, head, set) + channel;
    float scale = 1, low = 0;
    if (from[0] != 0) {  // the set has tokens
      const float max = from_ordered(from[0]), min = -from_ordered(from[p.head_dim]);
      const float margin = (max - min) * ((1.0f - clip) * 0.5f);
      low = min + margin;
      scale = rounded_half(((max - margin) - low) / ((1 << bits) - 1));
      scale = scale > 0 ? scale : 1.0f;
      from[0] = from[p.head_dim] = 0;
    }
    const int64_t index = static_cast<int64_t>(head) * p.n_key_sets + set;
    HalfBits* to = p.key_sets + index * 2 * p.head_dim + (has_order ? stored.position : channel);
    to[0] = static_cast<HalfBits>(ptx::pack_half2(scale, 0));
    to[p.head_dim] = static_cast<HalfBits>(ptx::pack_half2(rounded_half(low), 0));
    if (has_order) {
      p.key_orders[index * p.head_dim + stored.position] = static_cast<uint8_t>(channel);
    }
  }
  if (p.keep_factors) {
    return;
  }

  // C_c = sqrt(max |v|), times the power of two that puts the largest possible token scale of a
  // 2-bit class, 2/3 of the largest C_c, into [4, 8): small enough for weights in fp16, large
  // enough that small weights do not vanish there.
  __shared__ float largest[kWarpLanes];
  const uint32_t bits = value_extremes(p, head)[channel];
  value_extremes(p, head)[channel] = 0;
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

// 32 channels of the lane's tokens: chunk `chunk` of a matrix of kMatrixChannels channels. `keys`:
// the lane's 8 of them; `scales` and `minima`: theirs.
template <int kMatrixChannels, int kBits>
__device__ __forceinline__ void pack_key_chunk(const uint4 (&keys)[4], const bool (&used)[4],
                                               const HalfBits* scales, const HalfBits* minima,
                                               int lane, int chunk, uint8_t* matrix) {
  float scale[8], inverse[8], low[8];
  to_floats(load_channels(scales, 0, true), scale);
  to_floats(load_channels(minima, 0, true), low);
#pragma unroll
  for (int channel = 0; channel < 8; ++channel) {
    inverse[channel] = 1.0f / scale[channel];
  }
  uint32_t codes[4][8];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float x[8];
    to_floats(keys[n], x);
#pragma unroll
    for (int channel = 0; channel < 8; ++channel) {
      const uint32_t code =
          code_of<kBits>(quotient(x[channel] - low[channel], scale[channel], inverse[channel]));
      codes[n][channel] = used[n] ? code : 0u;
    }
  }
  store_key_words<kMatrixChannels, kBits>(matrix, lane, chunk, codes);
}

// Calls use(chunk, keys) for every 32 channels of the lane's tokens g + 8n, with its 8 of them.
template <int kHeadDim, typename Use>
__device__ __forceinline__ void for_key_chunks(const PackParams& p, const int64_t (&rows)[4],
                                               const bool (&used)[4], int lane, Use use) {
  constexpr int kBatch = 2;  // chunks whose loads are under way together
#pragma unroll 1
  for (int batch = 0; batch < kHeadDim / 32; batch += kBatch) {
    uint4 keys[kBatch][4];
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        keys[c][n] = load_channels(p.k, rows[n] + (batch + c) * 32 + (lane & 3) * 8, used[n]);
      }
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      use(batch + c, keys[c]);
    }
  }
}

template <int kHeadDim, int kBits>
__device__ __forceinline__ void pack_keys(const PackParams& p, const int64_t (&rows)[4],
                                          const bool (&used)[4], const HalfBits* set, int lane,
                                          uint8_t* tile) {
  for_key_chunks<kHeadDim>(p, rows, used, lane, [&](int chunk, const uint4(&keys)[4]) {
    const HalfBits* scales = set + chunk * 32 + (lane & 3) * 8;
    pack_key_chunk<kHeadDim, kBits>(keys, used, scales, scales + kHeadDim, lane, chunk, tile);
  });
}

// Halves between two tokens in shared memory; + 8 spreads them over the banks.
__host__ __device__ constexpr int staged_stride(int head_dim) { return head_dim + 8; }
constexpr int staged_bytes(int head_dim) {
  return kPackWarps * kTileTokens * staged_stride(head_dim) * 2;
}

// Keys with wide channels: the tile's rows go to shared memory as they are and come back in the
// order of the stored channels. `staged`: this warp's.
template <int kHeadDim>
__device__ __forceinline__ void pack_wide_keys(const PackParams& p, PageClass cls,
                                               const int64_t (&rows)[4], const bool (&used)[4],
                                               const HalfBits* set, const uint8_t* order,
                                               HalfBits* staged, int lane, uint8_t* tile) {
  constexpr int kStride = staged_stride(kHeadDim);
  const int first = (lane & 3) * 8;
  HalfBits* own = staged + (lane >> 2) * kStride;
  for_key_chunks<kHeadDim>(p, rows, used, lane, [&](int chunk, const uint4(&keys)[4]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      *reinterpret_cast<uint4*>(own + n * 8 * kStride + chunk * 32 + first) = keys[n];
    }
  });
  __syncwarp();
#pragma unroll 1
  for (int chunk = 0; chunk < kHeadDim / kChunkChannels; ++chunk) {
    const uint2 at = __ldg(reinterpret_cast<const uint2*>(order + chunk * 32 + first));
    uint4 keys[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const HalfBits* row = own + n * 8 * kStride;
      const auto pair = [&](uint32_t two) {
        return uint32_t{row[two & 0xff]} | uint32_t{row[two >> 8 & 0xff]} << 16;
      };
      keys[n] = {pair(at.x), pair(at.x >> 16), pair(at.y), pair(at.y >> 16)};
    }
    const HalfBits* scales = set + chunk * 32 + first;
    uint8_t* matrix = tile + key_chunk_offset(cls, chunk);
    if (chunk < cls.wide_chunks) {
      pack_key_chunk<kChunkChannels, kWideBits>(keys, used, scales, scales + kHeadDim, lane, 0,
                                                matrix);
    } else {
      pack_key_chunk<kChunkChannels, kBitsBesideWide>(keys, used, scales, scales + kHeadDim, lane,
                                                      0, matrix);
    }
  }
}

template <int kHeadDim, int kBits>
__device__ __forceinline__ void pack_values(const PackParams& p, const int64_t (&rows)[8],
                                            const bool (&used)[8], const float* factors, float clip,
                                            bool keep_length, int lane, uint8_t* codes_at,
                                            HalfBits* params) {
  constexpr float kLevels = (1 << kBits) - 1;
  const int first = (lane >> 2) * 8;
  // Calls use(token, x, factor) for the lane's tokens with its 8 channels of `part`, divided by
  // their factors. Keeping the values from one pass to the next was slower: 64 registers.
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
      use(token, x, factor);
    }
  };

  // The lane's 8 tokens over all channels: its own of them, then the 8 lanes that share the tokens.
  // Of these lanes, lane g gets, keeps and writes what is of token g: each step over the lanes
  // leaves half of the tokens.
  const int own = lane >> 2;
  const auto over_lanes = [own](float(&x)[8], auto combine) {
#pragma unroll
    for (int step = 0; step < 3; ++step) {
      const bool keeps_odd = (own >> step & 1) != 0;
#pragma unroll
      for (int n = 0; n < 4 >> step; ++n) {
        const float kept = keeps_odd ? x[2 * n + 1] : x[2 * n];
        const float given = keeps_odd ? x[2 * n] : x[2 * n + 1];
        x[n] = combine(kept, __shfl_xor_sync(ptx::kFullWarp, given, 4 << step));
      }
    }
    return x[0];
  };
  const auto sum_of = [](float x, float y) { return x + y; };
  const auto max_of = [](float x, float y) { return fmaxf(x, y); };
  const auto min_of = [](float x, float y) { return fminf(x, y); };
  float largest[8], least[8], squares[8];
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    largest[token] = -INFINITY, least[token] = INFINITY, squares[token] = 0;
  }
#pragma unroll 1
  for (int part = 0; part < kHeadDim / 64; ++part) {
    for_tokens(part, [&](int token, const float(&x)[8], const float(&factor)[8]) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        largest[token] = fmaxf(largest[token], x[c]);
        least[token] = fminf(least[token], x[c]);
        const float exact = factor[c] * x[c];
        squares[token] = fmaf(exact, exact, squares[token]);
      }
    });
  }
  uint32_t own_grid = 0, grid[8];  // (scale, zero): both are fp16, together they are a register
  {
    const float max = over_lanes(largest, max_of), min = over_lanes(least, min_of);
    const float margin = (max - min) * ((1.0f - clip) * 0.5f);
    const float low = min + margin;
    const float scale = rounded_half(fminf(((max - margin) - low) / kLevels, 127.0f));
    const float divisor = scale > 0 ? scale : 1.0f;
    own_grid = ptx::pack_half2(divisor, rounded_half(-low / divisor));
  }
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    grid[token] = __shfl_sync(ptx::kFullWarp, own_grid, token * 4 + (lane & 3));
  }
  const float own_square = over_lanes(squares, sum_of);

  float across[8] = {};  // exact . decoded
#pragma unroll 1
  for (int part = 0; part < kHeadDim / 64; ++part) {
    uint32_t codes[8][8];  // [token][channel]; 0 for an unused token, which is all zeros
    for_tokens(part, [&](int token, const float(&x)[8], const float(&factor)[8]) {
      const float scale = ptx::low_half(grid[token]);
      const float low = __fmul_rn(-ptx::high_half(grid[token]), scale);  // testable to the bit
      const float inverse = 1.0f / scale;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        codes[token][c] = code_of<kBits>(quotient(x[c] - low, scale, inverse));
        const float decoded = fmaf(static_cast<float>(codes[token][c]), scale, low);
        across[token] = fmaf(factor[c] * factor[c] * x[c], decoded, across[token]);
      }
    });
    store_value_words<kHeadDim, kBits>(codes_at, lane, part, codes);
  }

  bool own_used = false;
#pragma unroll
  for (int token = 0; token < 8; ++token) {
    own_used = token == own ? used[token] : own_used;
  }
  // Found in any case: a branch in the loops costs registers.
  float stretch = own_square / over_lanes(across, sum_of);
  stretch = keep_length && stretch >= 0.5f && stretch <= 2.0f ? stretch : 1.0f;
  const float scale = fminf(ptx::low_half(own_grid) * stretch, 127.0f);
  // Tokens of lane i: 2i, 2i+1, 2i+8, 2i+9, and those + 16.
  const int t = own / 4 * 16 + own / 2 % 2 * 8 + (lane & 3) * 2 + own % 2;
  const float unit = value_param_unit(kBits, t);
  const float zero = ptx::high_half(own_grid) / unit;
  params[scale_index(t)] = static_cast<HalfBits>(own_used ? ptx::pack_half2(scale * unit, 0) : 0);
  params[zero_index(t)] = static_cast<HalfBits>(own_used ? ptx::pack_half2(zero, 0) : 0);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kPackWarps* kWarpLanes, 3)
    pack_tiles(const __grid_constant__ Batch<PackParams> batch, int n_pages, int n_blocks) {
  const PackParams& p = batch.of[blockIdx.z];
  ptx::wait_for_launch_before();
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

  const int bytes = tile_bytes(kHeadDim, cls);
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
    const int64_t set_index = static_cast<int64_t>(head) * p.n_key_sets + p.key_set[entry.cls];
    const HalfBits* set = p.key_sets + set_index * 2 * kHeadDim;
    if (cls.wide_chunks > 0) {
      HalfBits* staged = reinterpret_cast<HalfBits*>(ptx::dynamic_shared()) +
                         threadIdx.x / kWarpLanes * kTileTokens * staged_stride(kHeadDim);
      pack_wide_keys<kHeadDim>(p, cls, rows, used, set, p.key_orders + set_index * kHeadDim, staged,
                               lane, to);
      return;
    }
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
  uint8_t* codes = to + tile_value_offset(kHeadDim, cls);
  HalfBits* params = reinterpret_cast<HalfBits*>(to + tile_param_offset(kHeadDim, cls));
  const float* factors = p.value_factors + static_cast<int64_t>(head) * kHeadDim;
  const float clip = p.value_clip[entry.cls];
  switch (cls.value_bits) {
    case 2:
      pack_values<kHeadDim, 2>(p, rows, used, factors, clip, p.keep_length, lane, codes, params);
      break;
    case 3:
      pack_values<kHeadDim, 3>(p, rows, used, factors, clip, p.keep_length, lane, codes, params);
      break;
    case 4:
      pack_values<kHeadDim, 4>(p, rows, used, factors, clip, p.keep_length, lane, codes, params);
      break;
    default:
      pack_values<kHeadDim, 8>(p, rows, used, factors, clip, p.keep_length, lane, codes, params);
      break;
  }
}

}  // namespace

cudaError_t launch_pack(std::span<const PackParams> batch, int n_pages, cudaStream_t stream) {
  const PackParams& p = batch[0];
  const dim3 slabs((p.n_tokens + kSlabSlots - 1) / kSlabSlots, p.n_kv_heads);
  cudaError_t error = launch_batch(false, find_ranges, slabs, kRangeThreads, 0, stream, batch);
  if (error != cudaSuccess) {
    return error;
  }
  error = launch_batch(true, finish_params, dim3(p.n_kv_heads), p.head_dim, 0, stream, batch);
  if (error != cudaSuccess) {
    return error;
  }
  const int n_blocks = (n_pages * kTilesPerPage + kPackWarps - 1) / kPackWarps;  // of a tensor
  const dim3 tiles(2 * n_blocks, p.n_kv_heads);
  bool has_wide = false;
  for (int cls = 0; cls < p.n_classes; ++cls) {
    has_wide |= p.classes[cls].wide_chunks > 0;
  }
  const int shared_bytes = has_wide ? staged_bytes(p.head_dim) : 0;
  const auto pack_with = [&](auto kernel) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    return allowed != cudaSuccess ? allowed
                                  : launch_batch(true, kernel, tiles, kPackWarps * kWarpLanes,
                                                 shared_bytes, stream, batch, n_pages, n_blocks);
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
