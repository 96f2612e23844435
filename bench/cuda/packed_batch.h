// The pages of a shape on the device: random codes and parameters, as many copies of the pool as
// keep the L2 cache cold from launch to launch.
#pragma once

#include <vector>

#include "cuda_bench.h"
#include "device_memory.h"
#include "kernels/cuda/params.h"

namespace zipcache::cuda {

// Where the pages of all rows lie, row after row, block after block, class after class: in every
// other block the other way round, as the plug-in has them. Classes of a block with keys of the
// same widths share a scale set.
struct PageLayout {
  std::vector<PageEntry> pages;
  std::vector<std::int32_t> row_begin{0}, set_base, class_tokens, class_set;  // of a block
  int n_sets = 0;                                                             // of a block
  int n_blocks = 1;                                                           // of a row
  std::size_t pool_bytes = 0;

  explicit PageLayout(const Shape& shape);
};

struct PackedBatch {
  PageLayout layout;
  PageClass classes[kMaxClasses];
  int n_copies;
  std::vector<HalfBits> host_sets;
  std::vector<std::uint8_t> host_orders;
  std::vector<float> host_factors;
  DeviceBuffer<std::uint8_t> pools;  // [n_copies, pool_bytes]
  DeviceBuffer<PageEntry> pages;
  DeviceBuffer<HalfBits> key_sets;
  DeviceBuffer<std::uint8_t> key_orders;
  DeviceBuffer<float> value_factors;

  explicit PackedBatch(const Shape& shape);
  const std::uint8_t* pool(int copy) const { return pools.data() + copy * layout.pool_bytes; }
  // Of one copy, parameters counted.
  double bytes() const {
    return double(layout.pool_bytes) + host_sets.size() * 2.0 + double(host_orders.size()) +
           host_factors.size() * 4.0;
  }
};

}  // namespace zipcache::cuda
