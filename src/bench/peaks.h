// What this machine can do at best, measured: the roofs that kernels are held against.
#pragma once

#include <cstdint>
#include <string_view>

namespace zipcache::bench {

struct Peaks {
  double read_bytes_per_s = 0;  // streaming reads from memory, all threads together
  double fma_flops_per_s = 0;   // fp32 multiply-adds on registers, two operations each
  // Multiply-adds of codes and 16-bit x as the kernels form them (two byte products each with
  // AVX-512 VNNI, one 16-bit product and a sum each with AVX2); 0 for "scalar", which uses floats.
  double dot_flops_per_s = 0;
};

// `isa` is a kernel table's name: the width of the vectors that it may use. Takes about a second.
Peaks measure_peaks(std::string_view isa, std::uint32_t n_threads);

// Thread `ith` of `n_threads` does its part of pushing everything out of the processor's caches.
void flush_caches(std::uint32_t ith, std::uint32_t n_threads);

}  // namespace zipcache::bench
