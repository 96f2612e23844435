#include "bench/peaks.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "base/aligned.h"
#include "bench/measure.h"

namespace zipcache::bench {
namespace {

constexpr std::size_t kStreamBytes = std::size_t{256} << 20;  // beyond any last-level cache
constexpr std::size_t kSteps = 2'000'000;
constexpr int kRounds = 5;

// Operations done: `kChains` independent multiply-adds a step, more than latency (4 cycles) times
// units (2). The empty asm keeps each chain alive, in a register of its own.
constexpr int kChains = 12;

#if defined(__x86_64__)

[[gnu::target("avx512f")]] double multiply_add_avx512() {
  __m512 sum[kChains] = {};
  const __m512 x = _mm512_set1_ps(0.999f);
  for (std::size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& chain : sum) {
      chain = _mm512_fmadd_ps(chain, x, x);
      __asm__ volatile("" : "+v"(chain));
    }
  }
  return 2.0 * 16 * kChains * kSteps;
}

[[gnu::target("avx512f,avx512vnni")]] double dot_avx512() {
  __m512i sum[kChains] = {};
  const __m512i x = _mm512_set1_epi8(1);
  for (std::size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& chain : sum) {
      chain = _mm512_dpbusd_epi32(chain, x, x);
      __asm__ volatile("" : "+v"(chain));
    }
  }
  return 2.0 * 64 / 2 * kChains * kSteps;
}

[[gnu::target("avx2")]] double dot_avx2() {
  __m256i sum[kChains] = {};
  __m256i x = _mm256_set1_epi16(1);
  for (std::size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& chain : sum) {
      __asm__ volatile("" : "+x"(x));  // the product is formed each time
      chain = _mm256_add_epi32(chain, _mm256_madd_epi16(x, x));
      __asm__ volatile("" : "+x"(chain));
    }
  }
  return 2.0 * 16 * kChains * kSteps;
}

[[gnu::target("avx2,fma")]] double multiply_add_avx2() {
  __m256 sum[kChains] = {};
  const __m256 x = _mm256_set1_ps(0.999f);
  for (std::size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (auto& chain : sum) {
      chain = _mm256_fmadd_ps(chain, x, x);
      __asm__ volatile("" : "+x"(chain));
    }
  }
  return 2.0 * 8 * kChains * kSteps;
}

#endif

double multiply_add_scalar() {
  float sum[kChains] = {};
  for (std::size_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (float& chain : sum) {
      chain = chain * 0.999f + 0.999f;
      __asm__ volatile("" : "+m"(chain));
    }
  }
  return 2.0 * kChains * kSteps;
}

double multiply_add(std::string_view isa) {
#if defined(__x86_64__)
  if (isa == "avx512") {
    return multiply_add_avx512();
  }
  if (isa != "scalar") {
    return multiply_add_avx2();
  }
#endif
  return multiply_add_scalar();
}

double dot(std::string_view isa) {
#if defined(__x86_64__)
  if (isa == "avx512") {
    return dot_avx512();
  }
  if (isa != "scalar") {
    return dot_avx2();
  }
#endif
  return 0.0;
}

std::uint64_t read(const std::uint64_t* data, std::size_t n) {
  std::uint64_t sum[8] = {};
  for (std::size_t i = 0; i + 8 <= n; i += 8) {
    for (std::size_t lane = 0; lane < 8; ++lane) {
      sum[lane] += data[i + lane];
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// The shortest of several rounds in which all threads run `work` at once.
double fastest(std::uint32_t n_threads, const std::function<void(std::uint32_t ith)>& work) {
  double seconds = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    seconds = std::min(seconds, seconds_of([&] {
                         std::vector<std::thread> threads;
                         for (std::uint32_t ith = 1; ith < n_threads; ++ith) {
                           threads.emplace_back(work, ith);
                         }
                         work(0);
                         std::for_each(threads.begin(), threads.end(),
                                       [](std::thread& thread) { thread.join(); });
                       }));
  }
  return seconds;
}

const AlignedVector<std::uint64_t>& stream_memory() {
  static const AlignedVector<std::uint64_t> kMemory(kStreamBytes / sizeof(std::uint64_t), 1);
  return kMemory;
}

volatile std::uint64_t sink;  // keeps reads from being optimized away

}  // namespace

Peaks measure_peaks(std::string_view isa, std::uint32_t n_threads) {
  const AlignedVector<std::uint64_t>& memory = stream_memory();
  const std::size_t part = memory.size() / n_threads;
  std::vector<double> flops(n_threads);
  const double read_seconds =
      fastest(n_threads, [&](std::uint32_t ith) { sink = read(&memory[ith * part], part); });
  const double fma_seconds =
      fastest(n_threads, [&](std::uint32_t ith) { flops[ith] = multiply_add(isa); });
  const double fma_flops = flops[0] * n_threads / fma_seconds;
  const double dot_seconds = fastest(n_threads, [&](std::uint32_t ith) { flops[ith] = dot(isa); });
  return {double(part * n_threads * sizeof(std::uint64_t)) / read_seconds, fma_flops,
          flops[0] * n_threads / dot_seconds};
}

void flush_caches(std::uint32_t ith, std::uint32_t n_threads) {
  const std::size_t part = stream_memory().size() / n_threads;
  sink = read(&stream_memory()[ith * part], part);
}

}  // namespace zipcache::bench
