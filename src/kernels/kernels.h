// The compute kernels of the cache, one table per instruction set. A table is chosen once by what
// the processor and the operating system support (or by name, for tests); all tables do the same
// within the tolerances of docs/architecture.md, and each is tested against ref/.
//
// Everything attention needs is one product, because both halves of attention sum over the inner
// axis of a matrix whose lanes lie side by side:
//   scores:  lanes = tokens,   inner = channels, x = folded queries
//   values:  lanes = channels, inner = tokens,   x = folded probabilities
#pragma once

#include <string_view>

#include "base/expected.h"
#include "kernels/table.h"

namespace zipcache::kernels {

// The best table for this machine; `force` ("" = automatic, else "scalar", "avx2", "avxvnni" or
// "avx512")
// comes from ZIPCACHE_FORCE_ISA. An unknown name or one that the machine can't run is an error that
// names what was asked, what the machine has and what is built in.
Expected<const KernelTable*> select_kernels(std::string_view force);

}  // namespace zipcache::kernels
