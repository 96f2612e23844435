// The tables that this build holds, one per instruction set. Only dispatch.cc chooses among them: a
// table may be called only where cpu/features.h says that its instructions run.
#pragma once

#include "kernels/table.h"

namespace zipcache::kernels {

namespace scalar {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avxvnni {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

}  // namespace zipcache::kernels
