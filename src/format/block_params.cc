#include "format/block_params.h"

#include <bit>
#include <cstring>

namespace zipcache::format {

void load_halves(const std::byte* halves, std::size_t n, float* out) {
  // Without a branch, so that it becomes vector code: decode attention loads hundreds of these for
  // each block and head. The product is exact, subnormals included.
  for (std::size_t i = 0; i < n; ++i) {
    Half half;
    std::memcpy(&half, halves + i * sizeof(Half), sizeof half);
    const auto sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const auto magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
    out[i] = std::bit_cast<float>(sign | magnitude) * 0x1p112f;
  }
}

void load_token_params(const BlockLayout& layout, const std::byte* block, Tensor t,
                       std::uint32_t head, int cls, std::uint32_t group, float* scale, float* min) {
  const std::byte* stored = block + layout.token_scale_min(t, head, group);
  const std::uint32_t n_slots = layout.param_slots(t);
  const std::uint32_t first = layout.first_slot(t, cls) - layout.first_param_slot(t);
  const std::uint32_t n = layout.class_tokens(t, cls);
  const TensorFormat& format = layout.tensor(t);
  if (format.token_params == TokenParams::kHalf) {
    load_halves(stored + first * sizeof(Half), n, scale);
    load_halves(stored + (n_slots + first) * sizeof(Half), n, min);
    return;
  }
  float base;
  load_halves(block + layout.token_base(t, head) + static_cast<std::size_t>(cls) * sizeof(Half), 1,
              &base);
  byte_params(base, format.bits[static_cast<std::size_t>(cls)],
              reinterpret_cast<const std::uint8_t*>(stored) + first,
              reinterpret_cast<const std::uint8_t*>(stored) + n_slots + first, n, scale, min);
}

}  // namespace zipcache::format
