// The table for AVX-VNNI once more, for kernels_test alone: compiled for AVX-512 VNNI, which has
// the same instruction in another encoding, its code is tested on machines that lack AVX-VNNI.
#define ZIPCACHE_AVXVNNI_TABLE kEvexTable
#include "kernels/cpu/avxvnni/table.cc"  // NOLINT(bugprone-suspicious-include)
