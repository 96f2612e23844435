// One function per machine instruction that C++ does not name.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace zipcache::cuda::ptx {
inline constexpr unsigned kFullWarp = 0xffffffffu;
}  // namespace zipcache::cuda::ptx

#if defined(ZC_CUDA_EMULATION)
#include "kernels/cuda/emulation/ptx.h"
#else

namespace zipcache::cuda::ptx {

// c += a * b over one 16x8x16 tile: a is 16 x 16 fp16, b is 16 x 8 fp16, c is 16 x 8 fp32.
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of bytes: a is 16 x 32, without sign, b is 32 x 8, with sign, c is 16 x 8, exact.
__device__ __forceinline__ void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8x8 matrix of 16-bit elements that a warp holds, one pair per lane.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// 2^x; 0 for -infinity.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// (x & mask) | bits in one operation. Left to itself the compiler takes two, each with a constant
// of its own (measured: 128 instead of 64 per tile and tensor).
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "r"(mask), "r"(bits));
  return out;
}

// Two floats rounded to fp16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// Arithmetic on pairs of fp16 numbers, each result rounded once.
__device__ __forceinline__ uint32_t fma_half2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(x), "r"(y), "r"(z));
  return out;
}
__device__ __forceinline__ uint32_t mul_half2(uint32_t x, uint32_t y) {
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
}
__device__ __forceinline__ uint32_t sub_half2(uint32_t x, uint32_t y) {
  uint32_t out;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
  return out;
}

__device__ __forceinline__ float low_half(uint32_t pair) {
  float out;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, lo;}" : "=f"(out) : "r"(pair));
  return out;
}
__device__ __forceinline__ float high_half(uint32_t pair) {
  float out;
  asm("{.reg .f16 lo, hi; mov.b32 {lo, hi}, %1; cvt.f32.f16 %0, hi;}" : "=f"(out) : "r"(pair));
  return out;
}

// The same number, of which the compiler knows nothing: what depends on it is computed where it is
// used, not before the loop, where it would hold registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 bytes of read-only global memory. Unlike __ldg it stays where it is written among the matrix
// instructions: hoisting all loads of a tile to its start would spill.
__device__ __forceinline__ uint4 load_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// The same of memory that this launch writes too.
__device__ __forceinline__ uint4 load_written_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// The same of shared memory.
__device__ __forceinline__ uint4 load_shared_16(const void* from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
  return v;
}

// Asks for the line of `from` to come to the L2 cache. (L1 does not keep what it is asked for.)
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Waits until the launch before this one in the stream has ended and its writes are visible.
// Without DecodeParams::start_early it has; before sm_90 too.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch may take what this one leaves free; it waits for this one's end by itself.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Adds 1 and returns what was there. What the block wrote before its barrier is visible to the
// block that sees this addition, and the other way round.
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The shared memory that a launch asked for.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t zipcache_shared[];
  return zipcache_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- Clusters: blocks that run together, where a launch asks for it (on sm_90) -------------------

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// All threads of the cluster arrive before any of them returns from wait(); what they wrote before
// is visible then.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// 16 bytes of what is at `own` in the shared memory of another block of the cluster.
__device__ __forceinline__ uint4 load_of_block(const void* own, int rank) {
  uint4 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .u32 at;\n\t"
      "mapa.shared::cluster.u32 at, %4, %5;\n\t"
      "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [at];\n\t}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(shared_address(own)), "r"(rank)
      : "memory");
#endif
  return v;
}

// --- Barriers that count arrivals and bytes ------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Waits for the phase of this parity. Everything that arrived before is visible after.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "WAIT:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra WAIT;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "WAIT:\n\t"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n\t"
      "@!done bra WAIT;\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
// True for one lane of a warp that is together.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n\t.reg .pred one;\n\t"
      "elect.sync _|one, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, one;\n\t}"
      : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// `bytes` (a multiple of 16) from global to shared memory, counted by `barrier`.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// --- Products of four warps ----------------------------------------------------------------------

// Columns as rows of 64 halves in shared memory, 128 bytes each, the first at a multiple of 1024:
// the 16-byte unit u of row r is at u ^ (r % 8). Of `from`; + n: n units on, to another row or 16
// channels. The other half of the descriptor says that 8 rows are 1024 bytes, swizzled over 128.
__device__ __forceinline__ uint32_t swizzled_operand(const void* from) {
  return (shared_address(from) & 0x3ffffu) >> 4 | 1u << 16;
}

// c = a * b, + c if `add`: a is 64 x 16, of which each warp has 16 rows as in mma_16x8x16, b is 16
// channels of 32 columns: c[n] columns 8n to 8n + 7. All four warps call these, in this order:
// begin(c), products, commit(), wait(c).
__device__ __forceinline__ void warpgroup_mma(float (&c)[4][4], const uint32_t (&a)[4], uint32_t b,
                                              bool add) {
  asm volatile(
      "{\n\t.reg .pred add;\n\t.reg .b64 b;\n\t"
      "setp.ne.b32 add, %21, 0;\n\t"
      "mov.b64 b, {%20, 0x40000040};\n\t"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, b, add, 1, 1, 0;\n\t}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(static_cast<int>(add)));
}
// The compiler keeps what uses c on its side of this.
template <int kColumns>
__device__ __forceinline__ void keep_in_order(float (&c)[kColumns][4]) {
#pragma unroll
  for (int n = 0; n < kColumns * 4; ++n) {
    asm volatile("" : "+f"(c[n / 4][n % 4])::"memory");
  }
}
template <int kColumns>
__device__ __forceinline__ void warpgroup_begin(float (&c)[kColumns][4]) {
  keep_in_order(c);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kPending` commits are under way: c is not of one of these.
template <int kPending, int kColumns>
__device__ __forceinline__ void warpgroup_wait(float (&c)[kColumns][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  keep_in_order(c);
}
#endif

// What this thread has written to shared memory becomes visible to products of four warps.
__device__ __forceinline__ void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// 16 bytes from global to shared memory, asynchronously.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// This thread arrives at `barrier` when its copies so far have completed.
__device__ __forceinline__ void arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace zipcache::cuda::ptx

#endif  // ZC_CUDA_EMULATION
