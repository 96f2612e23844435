#include "kernels/cpu/features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdint>
#include <string_view>

namespace zipcache::kernels {

#if defined(__x86_64__)
namespace {

// CPUID leaves 1 and 7 (and its subleaf 1) and XCR0. Read here, not with __builtin_cpu_supports:
// clang 14 does not know "f16c" there.
struct CpuWords {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0;
  std::uint32_t leaf7_ecx = 0;
  std::uint32_t leaf7_1_eax = 0;
  std::uint64_t xcr0 = 0;  // register files that the operating system saves
};

CpuWords read_cpu() {
  CpuWords cpu;
  std::uint32_t eax = 0;
  std::uint32_t ebx = 0;
  std::uint32_t ecx = 0;
  std::uint32_t edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0) {
    cpu.leaf1_ecx = ecx;
  }
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) {
    cpu.leaf7_ebx = ebx;
    cpu.leaf7_ecx = ecx;
    const std::uint32_t last_subleaf = eax;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) {
      cpu.leaf7_1_eax = eax;
    }
  }
  if ((cpu.leaf1_ecx >> 27 & 1u) != 0) {  // OSXSAVE: xgetbv exists
    std::uint32_t low = 0;
    std::uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.xcr0 = std::uint64_t{high} << 32 | low;
  }
  return cpu;
}

void require(std::string* missing, bool present, std::string_view name) {
  if (!present) {
    missing->append(missing->empty() ? "" : " ").append(name);
  }
}

bool bit(std::uint32_t word, int position) { return (word >> position & 1u) != 0; }

}  // namespace

std::string missing_for_avx2() {
  const CpuWords cpu = read_cpu();
  std::string missing;
  require(&missing, (cpu.xcr0 & 0x6u) == 0x6u, "ymm_state_saved_by_os");
  require(&missing, bit(cpu.leaf1_ecx, 12), "fma");
  require(&missing, bit(cpu.leaf1_ecx, 29), "f16c");
  require(&missing, bit(cpu.leaf7_ebx, 5), "avx2");
  return missing;
}

std::string missing_for_avxvnni() {
  std::string missing = missing_for_avx2();
  require(&missing, bit(read_cpu().leaf7_1_eax, 4), "avx_vnni");
  return missing;
}

std::string missing_for_avx512() {
  const CpuWords cpu = read_cpu();
  std::string missing = missing_for_avx2();
  require(&missing, (cpu.xcr0 & 0xe6u) == 0xe6u, "zmm_state_saved_by_os");
  require(&missing, bit(cpu.leaf7_ebx, 16), "avx512f");
  require(&missing, bit(cpu.leaf7_ebx, 17), "avx512dq");
  require(&missing, bit(cpu.leaf7_ebx, 30), "avx512bw");
  require(&missing, bit(cpu.leaf7_ebx, 31), "avx512vl");
  require(&missing, bit(cpu.leaf7_ecx, 11), "avx512_vnni");
  return missing;
}

#else

std::string missing_for_avx2() { return "x86-64"; }
std::string missing_for_avxvnni() { return "x86-64"; }
std::string missing_for_avx512() { return "x86-64"; }

#endif

}  // namespace zipcache::kernels
