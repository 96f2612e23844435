// Random device memory: the same in every run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/params.h"

namespace zipcache::cuda {

ZC_HOST_DEVICE inline std::uint32_t mix(std::uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
  return static_cast<std::uint32_t>(x >> 32);
}
ZC_HOST_DEVICE inline float unit_float(std::uint64_t x) { return (mix(x) >> 8) * 0x1p-24f; }

void fill_random(void* memory, std::size_t bytes, std::uint64_t seed);
// About normal numbers.
void fill_normal(HalfBits* halves, std::size_t n, std::uint64_t seed);
void fill_normal(float* floats, std::size_t n, std::uint64_t seed);
// Token scales in (1, 8) and zeros inside the code range, for every tile of the pages.
void fill_token_params(std::uint8_t* pool, const PageEntry* pages, int n_pages, int head_dim,
                       const PageClass (&classes)[kMaxClasses]);

}  // namespace zipcache::cuda
