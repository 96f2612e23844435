// A page of staged tokens: those that no block holds yet. Rows are exact (fp16), or packed: 8 bits
// with a scale per token, head and tensor, for tokens that a step has left behind.
//
// Keys stand channel by channel (no horizontal sums in scores), values token by token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned.h"
#include "base/half.h"
#include "format/block.h"

namespace zipcache::cache {

using format::Tensor;

inline constexpr std::uint32_t kNoCell = UINT32_MAX;
inline constexpr std::uint32_t kNoGroup = UINT32_MAX;
inline constexpr std::uint32_t kPageTokens = 32;  // most slots of a page

// What a staged token has seen and is; kept only under policies that seal.
struct StagedToken {
  std::uint32_t group = kNoGroup;  // tokens of one sequence; sealed together
  std::uint32_t arrival = 0;       // order of arrival in this cache
  std::uint32_t seen = 0;          // probe rows that could see it
  bool sink = false;               // never sealed
};

struct StagingPage {
  struct Shape {
    std::uint32_t capacity = kPageTokens;  // slots, 1..kPageTokens
    bool packed = false;                   // needs n_kv_heads
    std::uint32_t key_row = 0;
    std::uint32_t value_row = 0;
    std::uint32_t n_kv_heads = 0;  // 0: not known yet
    bool has_tokens = false;       // statistics are kept
    bool has_squares = false;
    std::size_t row_bytes() const;  // K and V of a token
    std::size_t bytes() const;      // of a page
  };

  explicit StagingPage(const Shape& shape);

  Shape shape;
  std::uint32_t used = 0;  // slots that hold a token
  // A value was NaN or infinite once: a weight of 0 does not silence it, so hidden tokens must be
  // left out of sums instead. Never of packed pages.
  bool has_non_finite = false;
  AlignedVector<std::byte> keys;     // [key_row, capacity] halves or codes
  AlignedVector<std::byte> values;   // [capacity, value_row] halves or codes
  std::vector<Half> scales;          // packed: [K and V, n_kv_heads, capacity]
  std::vector<std::uint32_t> cells;  // [capacity]; kNoCell = free slot
  std::vector<StagedToken> tokens;   // [capacity], or empty (fp16 policy)
  std::vector<float> mass;           // [capacity, n_kv_heads]: probe attention received
  std::vector<float> squares;        // as mass: of each row's; only where the metric asks

  std::size_t bytes() const { return shape.bytes(); }
  std::uint32_t capacity() const { return shape.capacity; }
  bool is_full() const { return used == shape.capacity; }
  std::uint32_t free_slot() const;  // REQUIRES: there is one

  // REQUIRES: an exact page.
  const Half* exact_keys() const { return reinterpret_cast<const Half*>(keys.data()); }
  Half* exact_keys() { return reinterpret_cast<Half*>(keys.data()); }
  const Half* exact_values() const { return reinterpret_cast<const Half*>(values.data()); }
  Half* exact_values() { return reinterpret_cast<Half*>(values.data()); }
  // REQUIRES: a packed page.
  const std::uint8_t* key_codes() const {
    return reinterpret_cast<const std::uint8_t*>(keys.data());
  }
  const std::uint8_t* value_codes() const {
    return reinterpret_cast<const std::uint8_t*>(values.data());
  }
  // Scale of slot s of a head: element s of this.
  const Half* slot_scales(Tensor tensor, std::uint32_t head) const {
    const std::size_t row = tensor == Tensor::kKey ? head : shape.n_kv_heads + head;
    return scales.data() + row * shape.capacity;
  }

  // A token's row: [key_row] or [value_row].
  void read(Tensor tensor, std::uint32_t slot, float* row) const;
  void write(Tensor tensor, std::uint32_t slot, const float* row);
  // All keys [key_row, capacity], free slots included.
  void read_all_keys(float* keys) const;

  // The same page with more slots; tokens keep theirs. REQUIRES: capacity >= this one's.
  StagingPage grown(std::uint32_t capacity) const;

  // Resets what is known of a slot's token.
  void reset_statistics(std::uint32_t slot, std::uint32_t arrival);
  // Moves a token to a free slot of `to`, which then has its cell. Packing makes NaN 0. `row` is
  // scratch.
  std::uint32_t move_to(StagingPage& to, std::uint32_t slot, std::vector<float>& row);
};

}  // namespace zipcache::cache
