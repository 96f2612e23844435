// The functions of ptx.cuh on the host. Matrix products add up exactly and then drop the bits
// beyond fp32, as the tensor cores do at best: what passes here has no help from rounding.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "base/half.h"

namespace zipcache::cuda::ptx {

namespace internal {

inline float half_of(uint32_t pair, int which) {
  return half_to_float(static_cast<Half>(pair >> 16 * which));
}
inline float toward_zero(double x) {
  const float rounded = static_cast<float>(x);
  return std::abs(static_cast<double>(rounded)) > std::abs(x) ? std::nextafter(rounded, 0.0f)
                                                              : rounded;
}

// A lane's operands as floats: a[word][half], b[word][half].
struct MatrixLane {
  float a[4][2], b[2][2];
};

// Arrivals, bytes and phase of one barrier, in the 8 bytes that it has.
struct Barrier {
  uint8_t expected, pending, phase, unused;
  int32_t bytes;

  void settle() {
    if (pending == 0 && bytes == 0) {
      phase ^= 1;
      pending = expected;
    }
  }
};
inline uint8_t* at(uint32_t address) { return emulation::shared_memory() + address; }
inline Barrier& barrier_at(uint32_t address) { return *reinterpret_cast<Barrier*>(at(address)); }

}  // namespace internal

inline void prefetch(const void*) {}
inline void wait_for_launch_before() {}
inline void let_next_launch_start() {}
inline int cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }
inline uint4 load_of_block(const void* own, int rank) {
  const auto offset = static_cast<const uint8_t*>(own) - emulation::shared_memory();
  return *reinterpret_cast<const uint4*>(emulation::shared_memory_of(rank) + offset);
}
inline uint32_t take_ticket(uint32_t* counter) { return (*counter)++; }

inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using internal::half_of;
  internal::MatrixLane own;
  for (int half = 0; half < 2; ++half) {
    for (int word = 0; word < 4; ++word) {
      own.a[word][half] = half_of(a[word], half);
    }
    own.b[0][half] = half_of(b0, half);
    own.b[1][half] = half_of(b1, half);
  }
  const auto* all = reinterpret_cast<const internal::MatrixLane*>(
      emulation::exchange(emulation::Operation::kMatrix, &own, sizeof(own)));
  static_assert(sizeof(own) == emulation::kLaneBytes);
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  for (int n = 0; n < 4; ++n) {
    const int row = n / 2, column = i * 2 + n % 2;  // row g + 8 * row
    double sum = c[n];
    for (int word = 0; word < 2; ++word) {
      for (int source = 0; source < 4; ++source) {
        const float(&left)[2] = all[g * 4 + source].a[row + 2 * word];
        const float(&right)[2] = all[column * 4 + source].b[word];
        sum += double{left[0]} * right[0] + double{left[1]} * right[1];
      }
    }
    c[n] = internal::toward_zero(sum);
  }
}

inline void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    uint8_t a[4][4];
    int8_t b[2][4];
    uint8_t unused[emulation::kLaneBytes - 24];
  } own{};
  std::memcpy(own.a, a, sizeof(own.a));
  std::memcpy(own.b[0], &b0, 4);
  std::memcpy(own.b[1], &b1, 4);
  const auto* all = reinterpret_cast<const Lane*>(
      emulation::exchange(emulation::Operation::kMatrix, &own, sizeof(own)));
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  for (int n = 0; n < 4; ++n) {
    const int row = n / 2, column = i * 2 + n % 2;  // row g + 8 * row
    for (int word = 0; word < 2; ++word) {
      for (int source = 0; source < 4; ++source) {
        for (int byte = 0; byte < 4; ++byte) {
          c[n] += int{all[g * 4 + source].a[row + 2 * word][byte]} *
                  all[column * 4 + source].b[word][byte];
        }
      }
    }
  }
}

inline uint8_t* dynamic_shared() { return emulation::shared_memory(); }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulation::shared_memory());
}

// Each warp by itself, in columns of 8.
inline uint32_t swizzled_operand(const void* from) { return shared_address(from) / 16; }
template <int kColumns>
void warpgroup_mma(float (&c)[kColumns][4], const uint32_t (&a)[4], uint32_t b, bool add) {
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  const uint32_t first_row = b / 64 * 1024, within = b * 16 - first_row;  // bytes
  const auto word = [&](int row, uint32_t byte) {
    const uint32_t unit = (byte / 16) ^ (row % 8);
    uint32_t pair;
    std::memcpy(&pair, internal::at(first_row + row * 128 + unit * 16 + byte % 16), sizeof(pair));
    return pair;
  };
  for (int n = 0; n < kColumns; ++n) {
    for (float& sum : c[n]) {
      sum = add ? sum : 0;
    }
    mma_16x8x16(c[n], a, word(n * 8 + g, within + 4 * i), word(n * 8 + g, within + 16 + 4 * i));
  }
}
template <typename Sums>
void warpgroup_begin(Sums&) {}
inline void warpgroup_commit() {}
template <int kPending, typename Sums>
void warpgroup_wait(Sums&) {}
inline void fence_async_proxy() {}

inline uint32_t transpose_8x8(uint32_t pair) {
  const std::byte* all = emulation::exchange(emulation::Operation::kTranspose, &pair, sizeof(pair));
  const int lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  uint32_t out = 0;
  for (int half = 0; half < 2; ++half) {
    const auto row = emulation::of_lane<uint32_t>(all, (i * 2 + half) * 4 + g / 2);
    out |= (row >> 16 * (g % 2) & 0xffff) << 16 * half;
  }
  return out;
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline float exp2(float x) { return std::exp2(x); }
inline int opaque(int x) { return x; }
inline float reciprocal(float x) { return 1.0f / x; }
inline uint32_t pack_half2(float low, float high) {
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}
inline float low_half(uint32_t pair) { return internal::half_of(pair, 0); }
inline float high_half(uint32_t pair) { return internal::half_of(pair, 1); }
inline uint32_t fma_half2(uint32_t x, uint32_t y, uint32_t z) {
  return pack_half2(std::fma(low_half(x), low_half(y), low_half(z)),
                    std::fma(high_half(x), high_half(y), high_half(z)));
}
inline uint32_t mul_half2(uint32_t x, uint32_t y) {
  return pack_half2(low_half(x) * low_half(y), high_half(x) * high_half(y));
}
inline uint32_t sub_half2(uint32_t x, uint32_t y) {
  return pack_half2(low_half(x) - low_half(y), high_half(x) - high_half(y));
}
inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
inline uint4 load_written_16(const void* from) { return load_16(from); }
inline uint4 load_shared_16(const void* from) { return *static_cast<const uint4*>(from); }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  const auto n = static_cast<uint8_t>(arrivals);
  internal::barrier_at(barrier) = {n, n, 0, 0, 0};
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (internal::barrier_at(barrier).phase == parity) {
    emulation::yield();
  }
}
inline bool elect_lane() { return threadIdx.x % 32 == 0; }
inline void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  internal::Barrier& b = internal::barrier_at(barrier);
  b.bytes += static_cast<int32_t>(bytes);
  --b.pending;
  b.settle();
}
inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  std::memcpy(internal::at(to), from, bytes);
  internal::Barrier& b = internal::barrier_at(barrier);
  b.bytes -= static_cast<int32_t>(bytes);
  b.settle();
}
inline void fence_barrier_init() {}
inline void copy_16(uint32_t to, const void* from) { std::memcpy(internal::at(to), from, 16); }
inline void arrive_after_copies(uint32_t barrier) {
  internal::Barrier& b = internal::barrier_at(barrier);
  --b.pending;
  b.settle();
}
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}

}  // namespace zipcache::cuda::ptx
