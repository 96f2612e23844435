// Device pages on the host: reading and writing single codes and parameters, for importers and
// tests. Slow by design; positions come from device_page.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/half.h"
#include "kernels/cuda/device_page.h"

namespace zipcache::cuda {

// A view of the bytes of one page; not an owner.
class HostPage {
 public:
  // REQUIRES: bytes.size() >= page_bytes(head_dim, cls).
  HostPage(std::span<std::byte> bytes, int head_dim, PageClass cls)
      : bytes_(bytes), head_dim_(head_dim), cls_(cls) {}

  // `channel` of keys: the stored one.
  int key_code(int token, int channel) const {
    return code(token, key_position(head_dim_, cls_, token % kTileTokens, channel));
  }
  int value_code(int token, int channel) const { return code(token, value_at(token, channel)); }
  void set_key_code(int token, int channel, int code) {
    set_code(token, key_position(head_dim_, cls_, token % kTileTokens, channel), code);
  }
  void set_value_code(int token, int channel, int code) {
    set_code(token, value_at(token, channel), code);
  }

  // Token scale s and zero z of the values.
  Half scale(int token) const {
    return times(param(token, scale_index(token % kTileTokens)), 1 / param_unit(token));
  }
  Half zero(int token) const {
    return times(param(token, zero_index(token % kTileTokens)), param_unit(token));
  }
  void set_scale_zero(int token, Half scale, Half zero) {
    set_param(token, scale_index(token % kTileTokens), times(scale, param_unit(token)));
    set_param(token, zero_index(token % kTileTokens), times(zero, 1 / param_unit(token)));
  }

 private:
  float param_unit(int token) const {
    return value_param_unit(cls_.value_bits, token % kTileTokens);
  }
  static Half times(Half x, float factor) { return float_to_half(half_to_float(x) * factor); }
  CodePosition value_at(int token, int channel) const {
    const int start = tile_value_offset(head_dim_, cls_);
    CodePosition at = value_position(head_dim_, cls_.value_bits, token % kTileTokens, channel);
    at.low.offset += start;
    at.high.offset += start;
    return at;
  }
  std::byte* tile(int token) const {
    return bytes_.data() + token / kTileTokens * tile_bytes(head_dim_, cls_);
  }
  static int read(const std::byte* tile, const BitField& field) {
    std::uint32_t word;
    std::memcpy(&word, tile + field.offset, sizeof(word));
    return static_cast<int>(word >> field.shift & ((1u << field.bits) - 1));
  }
  static void write(std::byte* tile, const BitField& field, std::uint32_t value) {
    std::uint32_t word;
    std::memcpy(&word, tile + field.offset, sizeof(word));
    const std::uint32_t mask = ((1u << field.bits) - 1) << field.shift;
    word = (word & ~mask) | (value << field.shift & mask);
    std::memcpy(tile + field.offset, &word, sizeof(word));
  }
  int code(int token, const CodePosition& at) const {
    const int low = read(tile(token), at.low);
    return at.high.bits == 0 ? low : low | read(tile(token), at.high) << at.low.bits;
  }
  void set_code(int token, const CodePosition& at, int code) {
    write(tile(token), at.low, static_cast<std::uint32_t>(code));
    if (at.high.bits != 0) {
      write(tile(token), at.high, static_cast<std::uint32_t>(code) >> at.low.bits);
    }
  }
  std::byte* params(int token) const { return tile(token) + tile_param_offset(head_dim_, cls_); }
  Half param(int token, int index) const {
    Half half;
    std::memcpy(&half, params(token) + index * sizeof(Half), sizeof(Half));
    return half;
  }
  void set_param(int token, int index, Half half) {
    std::memcpy(params(token) + index * sizeof(Half), &half, sizeof(Half));
  }

  std::span<std::byte> bytes_;
  int head_dim_;
  PageClass cls_;
};

}  // namespace zipcache::cuda
