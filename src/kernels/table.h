// What a kernel table is: plain structs and function pointers, without any library header, because
// units compiled for one instruction set include it (kernels.h is the header for everyone else).
#pragma once

#include <cstddef>
#include <cstdint>

namespace zipcache::kernels {

// A read-only matrix [inner][lanes] of codes (bits 2, 3, 4, 8: format/code_matrix.h, 64-byte
// aligned) or of fp16 (bits 16: row-major over inner, `half_stride` halves between inner positions,
// any alignment). Not an owner.
struct MatrixView {
  const void* data = nullptr;
  int bits = 16;
  std::uint32_t lanes = 0;        // lanes to compute; code matrices: padded to 16 in memory
  std::uint32_t inner = 0;        // positions to sum over
  std::uint32_t half_stride = 0;  // bits == 16 only; >= lanes
};

// Scratch that one thread lends to a kernel call; contents are meaningless between calls.
struct Scratch {
  void* data = nullptr;  // 64-byte aligned
  std::size_t bytes = 0;
};

// All pointers to float are 4-byte aligned at least. NaN and infinities in x or fp16 data propagate
// as in IEEE arithmetic to their own row only. Thread-safe: no global state.
struct KernelTable {
  const char* isa;  // "scalar", "avx2", "avxvnni", "avx512"

  // y[r * y_stride + lane] = sum_i x[r * x_stride + i] * m[i][lane], r < n_rows, lane < m.lanes.
  // Codes enter as plain unsigned integers. y beyond m.lanes may be written up to the next multiple
  // of 16 lanes (callers provide the room), for code and for fp16 matrices alike.
  // REQUIRES: x readable and zero up to format::padded_inner(m.bits, m.inner) (bits 16: m.inner);
  //           scratch.bytes >= matmul_scratch_bytes(n_rows, m.inner).
  // A row's result does not depend on n_rows or on other rows.
  void (*matmul)(const MatrixView& m, const float* x, std::size_t x_stride, std::size_t n_rows,
                 float* y, std::size_t y_stride, Scratch scratch);

  // s[i] = -infinity where bit i of `visible` (little endian in 64-bit words) is 0.
  void (*mask)(float* s, std::size_t n, const std::uint64_t* visible);

  // Largest element; -infinity for n == 0; NaN elements may be skipped.
  float (*max)(const float* s, std::size_t n);

  // s[i] = exp2(s[i] - m), exactly 0 for s[i] == -infinity; returns the sum. All zero when
  // m == -infinity. NaN propagates. Relative error of one exp2 <= 2e-7 for results >= 2^-120;
  // results below 2^-126 may be flushed to 0.
  float (*exp2_sum)(float* s, std::size_t n, float m);

  // y[i] = a * y[i] + b * x[i].
  void (*axpby)(float* y, std::size_t n, float a, const float* x, float b);

  // y[i] = x[i] * w[i] (x may be y).
  void (*multiply)(float* y, const float* x, const float* w, std::size_t n);

  // sum_i x[i] * w[i].
  float (*dot)(const float* x, const float* w, std::size_t n);
};

// Upper bound over all tables of the scratch that matmul needs.
[[gnu::always_inline]] constexpr std::size_t matmul_scratch_bytes(std::size_t n_rows,
                                                                  std::size_t inner) {
  return n_rows * ((inner + 63) / 64 * 64 * 4 + 64) + 4096;
}

}  // namespace zipcache::kernels
