// Quantizes tokens into a sealed block and back (paper section 4, Algorithms 1 to 3). The
// arithmetic, step by step: docs/formats.md, "How a block is made".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/task_team.h"
#include "format/block.h"

namespace zipcache::quant {

// How ranges become (scale, zero point).
enum class Rounding : std::uint8_t {
  kFloatMin,       // s = (max - min) / (2^k - 1), x^ = q * s + min          (default, official)
  kIntegerOffset,  // z = -round(min / s), x^ = (q - z) * s; stored as min = -z * s   (paper Eq. 5)
};

struct TensorRules {
  Rounding rounding = Rounding::kFloatMin;  // TokenParams::kByte has its own zero point: ignored
  // Per class: the range is shrunk about its centre to this fraction before the scale is computed
  // (1 = min-max), and with kByte then extended to hold 0. Codes are clamped.
  std::array<float, 2> clip{1.0f, 1.0f};
  float wide_clip = 1.0f;  // of wide channels
  // Token parameters: a token's scale and min are then stretched until its stored vector y has
  // x . y = x . x. Clipping shortens vectors, and what all tokens lose alike does not average out.
  bool keep_length = false;
  bool clip_about_zero = false;  // both ends are multiplied by the fraction instead (SKVQ)

  // What calibration or earlier steps give, for all heads [n_kv_heads, head_dim]; not owners.
  std::span<const float> given_factors{};          // required where the format says given_factors
  std::span<const std::uint16_t> channel_order{};  // required where it says reordered
  // What squared errors of the channels weigh against each other; empty = the same. Those with the
  // largest weight * range^2 become the wide ones.
  std::span<const float> channel_weights{};
};

struct QuantRules {
  TensorRules key;
  TensorRules value;
};

// Encodes keys [n_tokens, n_kv_heads, key_dim] and values [n_tokens, n_kv_heads, value_dim] (token
// order) as one block. tiers: [n_kv_heads, n_tokens], tier counts as layout.tier_tokens() says
// (may be empty when layout.n_tiers() == 1). `block` is layout.total_bytes() long, 64-byte aligned,
// and is overwritten whole. Arithmetic is float without contraction: the same bytes on every
// machine. Non-finite inputs: NaN counts as 0 and infinities as the largest finite half in ranges
// and codes; no NaN reaches a code or parameter. Magnitudes above 2^100 count as 2^100; parameters
// beyond fp16 are stored as its largest finite value. `team`: takes heads in parallel; same bytes.
void encode_block(const format::BlockLayout& layout, const QuantRules& rules,
                  std::span<const float> keys, std::span<const float> values,
                  std::span<const std::uint8_t> tiers, std::byte* block, TaskTeam* team = nullptr);

// Tokens that join a block, behind its own: they are encoded as a block of `added`, but on the
// grids of the one that is there (its wide channels, channel factors, scales and minima of
// channels, bases of token parameters). Channels of keys that leave their grid by more than half a
// step have it widened, and the codes of the old tokens moved to it. `out` is joined.total_bytes()
// long, 64-byte aligned, and overwritten whole; the rest as above. REQUIRES: `joined` was made from
// format::joined_shape() of the other two.
void append_tokens(const format::BlockLayout& layout, const std::byte* block,
                   const format::BlockLayout& added, const QuantRules& rules,
                   std::span<const float> keys, std::span<const float> values,
                   std::span<const std::uint8_t> tiers, const format::BlockLayout& joined,
                   std::byte* out, TaskTeam* team = nullptr);

// The stored values in token order; same shapes as above. Either output may be empty.
void decode_block(const format::BlockLayout& layout, const std::byte* block, std::span<float> keys,
                  std::span<float> values);

// Keys of one block replaced, classes and values kept (a context shift rotates stored keys). The
// only re-quantization in the append-only modes.
void replace_keys(const format::BlockLayout& layout, const QuantRules& rules,
                  std::span<const float> keys, std::byte* block);

// A block that held exact values (width 16) becomes one of `layout` whose values are quantized;
// keys are copied as they are. `out` is layout.total_bytes() long and overwritten whole.
// REQUIRES: the two layouts differ in their values' format only, and have the same tiers.
void replace_values(const format::BlockLayout& from, const std::byte* block,
                    const format::BlockLayout& layout, const TensorRules& rules,
                    std::span<const float> values, std::byte* out);

}  // namespace zipcache::quant
