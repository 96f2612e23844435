// What the processor and the operating system can run.
#pragma once

#include <string>

namespace zipcache::kernels {

// Instruction sets that a table needs and this machine lacks, "" if it can run the table: for
// example "avx512f avx512_vnni". AVX counts only if the operating system saves its registers.
std::string missing_for_avx2();
std::string missing_for_avxvnni();
std::string missing_for_avx512();

}  // namespace zipcache::kernels
