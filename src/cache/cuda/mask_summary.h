// summarize_mask() of masks that are in host memory: where the engine's own bytes are at hand, no
// step waits for the device to look at them.
#pragma once

#include "kernels/cuda/window_kernels.h"

namespace zipcache::cuda {

// All pointers are the host's. Reads every element once, a row after the other.
void summarize_mask_on_host(const MaskSummaryParams& params);

}  // namespace zipcache::cuda
