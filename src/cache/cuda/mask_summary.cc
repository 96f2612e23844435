#include "cache/cuda/mask_summary.h"

#include <algorithm>

namespace zipcache::cuda {

void summarize_mask_on_host(const MaskSummaryParams& p) {
  constexpr HalfBits kMinusInfinity = 0xfc00;
  for (std::int64_t plane = 0; plane < p.n_planes; ++plane) {
    std::uint8_t* const flags = p.flags + plane * p.n_cells;
    std::fill_n(flags, p.n_cells, p.n_rows > 0 ? kSeenByAll : std::uint8_t{0});
    for (std::int64_t row = 0; row < p.n_rows; ++row) {
      const HalfBits* const mask = p.mask + plane * p.plane_stride + row * p.row_stride;
      std::int32_t n_seen = 0;
      for (std::int64_t cell = 0; cell < p.n_cells; ++cell) {
        const bool seen = mask[cell] != kMinusInfinity;
        n_seen += seen;
        // Seen by any stays; seen by all goes where a row does not see the cell.
        flags[cell] =
            static_cast<std::uint8_t>(seen ? flags[cell] | kSeenByAny : flags[cell] & kSeenByAny);
      }
      p.row_counts[plane * p.n_rows + row] = n_seen;
    }
  }
}

}  // namespace zipcache::cuda
