// The bytes of one sealed block: the K and V of `n_tokens` tokens of one layer, quantized once.
// Normative text: docs/formats.md.
//
// Tokens have tiers per KV head (0 = most salient). A tensor (K or V) has one or two precision
// classes; the class of a token follows from its tier, and all heads have the same counts. Inside a
// head the tokens stand in SLOT order: tier 0 first, then tier 1, ..., each in token order; so
// class 0 of a tensor is slots [0, class0_tokens) and class 1 the rest, for K and for V alike.
//
// value of an element, token slot t, channel c, code q:
//   channelwise        scale[class][c] * q + min[class][c]
//   tokenwise          scale[t][g] * q + min[t][g]              g = channel group of c
//   channel_separable  channel[c] * (scale[t][g] * q + min[t][g])
// plus, where the tensor has them, a low-rank term and outliers. Channelwise keys may keep some of
// a head's channels, the wide ones, at a width of their own in every class; they come first in the
// order in which channels are stored. A class of width 16 holds fp16
// values instead of codes; one of width 0 holds nothing: its tokens are evicted, that is, read as
// zeros and visible to no query.
//
// Sections, each 64-byte aligned and in this order; gaps hold zeros:
//   for each head: K codes (class 0, class 1; per class one matrix per channel group, lanes =
//                  tokens, inner = channels of the group; wide channels are a group), V codes
//                  (lanes = channels of the group, inner = tokens of the class)
//   for each head (16-byte aligned): K parameters, V parameters; a tensor's end with its channel
//                  order or wide channels, low-rank factors and outliers
//   K and V token parameters shared over heads (slot_shared), if any; each 16-byte aligned
//   for each head: tier planes, 1 bit per token and plane (plane p = bit p of the tier; token t is
//                  bit t % 8 of byte t / 8; planes are padded to 8 bytes)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/half.h"
#include "format/code_matrix.h"

namespace zipcache::format {

enum class Granularity : std::uint8_t { kChannelwise, kTokenwise, kChannelSeparable };

// How (scale, min) of a token are stored (tokenwise and channel_separable):
//   kHalf: two fp16 planes, scale[slot] then min[slot].
//   kByte: two u8 planes e[slot], z[slot] and one fp16 `base` per class:
//          scale = base * (1 + (e & 15) / 16) * 2^((e >> 4) - 15),
//          min = -scale * z * (2^bits - 1) / 255; so the range always includes 0.
enum class TokenParams : std::uint8_t { kHalf, kByte };

inline constexpr std::uint8_t kExactBits = 16;
inline constexpr std::uint8_t kEvictedBits = 0;
constexpr bool is_class_width(int bits) {
  return is_code_width(bits) || bits == kExactBits || bits == kEvictedBits;
}

struct TensorFormat {
  Granularity granularity = Granularity::kChannelwise;
  TokenParams token_params = TokenParams::kHalf;
  bool class_factors = false;  // channel factors per class instead of over all tokens
  bool slot_shared = false;    // one (scale, min) per slot for all heads; kHalf, one group only
  std::uint16_t group_channels = 0;  // channels that share a token's (scale, min); 0 = head_dim
  std::uint8_t n_classes = 1;
  std::array<std::uint8_t, 2> bits{4, 2};
  std::uint32_t class0_tokens = 0;  // n_classes == 2: tokens of class 0 (0..n_tokens)

  std::uint16_t group_tokens = 0;   // channelwise K: slots that share a (scale, min); 0 = the class
  bool given_factors = false;       // channel factors came from outside, not from these tokens
  bool reordered = false;           // channels stand in a stored order; groups follow that order
  std::uint16_t wide_channels = 0;  // channelwise K: channels whose codes have wide_bits; 0 = none
  std::uint8_t wide_bits = 4;
  std::uint8_t rank = 0;       // of the low-rank term; 0 = none
  std::uint16_t outliers = 0;  // per channel (K) or token (V), each with its place; 0 = none

  bool operator==(const TensorFormat&) const = default;
};

struct BlockShape {
  std::uint32_t n_tokens = 0;
  std::uint32_t n_kv_heads = 0;
  std::uint32_t key_dim = 0;    // head_dim of K, a multiple of 16
  std::uint32_t value_dim = 0;  // head_dim of V, a multiple of 16
  TensorFormat key;
  TensorFormat value;

  bool operator==(const BlockShape&) const = default;
};

enum class Tensor : std::uint8_t { kKey, kValue };

// Offsets of everything inside a block's bytes. A pure function of the shape; cheap to copy.
// REQUIRES: a shape for which is_valid() holds.
class BlockLayout {
 public:
  // Head dims are multiples of 16 up to 512; group_channels divides head_dim and is a multiple of
  // 16 (or 0; channelwise: 0 or head_dim); slot_shared needs kHalf, one group and token parameters;
  // kByte needs token parameters; an unused class's width and class0_tokens don't matter.
  // group_tokens is for channelwise K and a multiple of 16. wide_channels is for channelwise K
  // whose classes all have codes, a multiple of 16 below head_dim, and excludes reordered, rank and
  // outliers. Width 0 is for class 1 of both tensors,
  // with the same class 0. rank and outliers need one class in both tensors and at most 65536
  // tokens; outliers at most n_tokens (K) or head_dim (V).
  static bool is_valid(const BlockShape& shape);
  explicit BlockLayout(const BlockShape& shape);

  const BlockShape& shape() const { return shape_; }
  const TensorFormat& tensor(Tensor t) const {
    return t == Tensor::kKey ? shape_.key : shape_.value;
  }
  std::uint32_t head_dim(Tensor t) const {
    return t == Tensor::kKey ? shape_.key_dim : shape_.value_dim;
  }

  std::size_t total_bytes() const { return total_bytes_; }
  std::size_t codes_bytes() const { return codes_bytes_; }
  std::size_t params_bytes() const { return params_bytes_; }
  std::size_t masks_bytes() const { return total_bytes_ - codes_bytes_ - params_bytes_; }

  // Slots of a class: [first_slot, first_slot + class_tokens).
  std::uint32_t class_tokens(Tensor t, int cls) const;
  std::uint32_t first_slot(Tensor t, int cls) const;
  // Channel groups per head: 1 for channelwise, or 2 where it has wide channels.
  std::uint32_t n_groups(Tensor t) const;
  std::uint32_t first_channel(Tensor t, std::uint32_t group) const;  // in stored order
  std::uint32_t group_channels(Tensor t, std::uint32_t group) const;
  // Of all groups. REQUIRES: no wide channels.
  std::uint32_t group_channels(Tensor t) const;
  int code_bits(Tensor t, int cls, std::uint32_t group) const;
  std::uint32_t n_token_groups(Tensor t, int cls) const;  // channelwise; 1 unless group_tokens
  std::uint32_t group_tokens(Tensor t, int cls) const;    // of all but the last such group

  // Whether a class has codes (and scales), as opposed to fp16 values or nothing.
  bool has_codes(Tensor t, int cls) const { return is_code_width(tensor(t).bits[cls]); }
  bool evicts() const { return shape_.key.n_classes == 2 && shape_.key.bits[1] == kEvictedBits; }

  // Byte offsets from the start of the block.
  std::size_t codes(Tensor t, std::uint32_t head, int cls, std::uint32_t group) const;
  std::size_t codes_size(Tensor t, int cls, std::uint32_t group) const;  // bytes of such a matrix
  // All parameters of a tensor in a head but those shared over the heads.
  std::size_t params(Tensor t, std::uint32_t head) const;
  std::size_t params_size(Tensor t) const { return offsets(t).params_size; }
  // Channelwise: fp16 scale[head_dim] directly followed by fp16 min[head_dim].
  std::size_t channel_scale_min(Tensor t, std::uint32_t head, int cls,
                                std::uint32_t token_group = 0) const;
  // Channel_separable: fp16 channel[head_dim] of the class; one for all classes unless
  // class_factors is set.
  std::size_t channel_factor(Tensor t, std::uint32_t head, int cls) const;
  // kHalf: fp16 scale[n] directly followed by fp16 min[n], in slot order; kByte: u8 e[n] directly
  // followed by u8 z[n]. n = param_slots(t), beginning with slot first_param_slot(t): the slots of
  // classes with codes.
  std::size_t token_scale_min(Tensor t, std::uint32_t head, std::uint32_t group) const;
  std::uint32_t first_param_slot(Tensor t) const;
  std::uint32_t param_slots(Tensor t) const;
  // kByte: fp16 base[n_classes] of the head.
  std::size_t token_base(Tensor t, std::uint32_t head) const;
  // Reordered: u16 order[head_dim]; stored channel p is channel order[p].
  std::size_t channel_order(Tensor t, std::uint32_t head) const;
  // Wide channels: bit c % 8 of byte c / 8 of head_dim bits is set if channel c is one.
  std::size_t wide_mask(Tensor t, std::uint32_t head) const;
  // fp16 token[rank][n_tokens], then fp16 channel[rank][head_dim]: the term is their product.
  std::size_t low_rank(Tensor t, std::uint32_t head) const;
  // n vectors (channels of K, tokens of V) of tensor(t).outliers each: u16 place[n][outliers] (a
  // token of K, a channel of V), then fp16 value[n][outliers], added to the element.
  std::size_t outliers(Tensor t, std::uint32_t head) const;
  std::uint32_t outlier_vectors(Tensor t) const {
    return t == Tensor::kKey ? shape_.key_dim : shape_.n_tokens;
  }

  // Tiers: 1 (no planes), 2 or 3: the slots between the class borders of K and V. A border at 0 or
  // at n_tokens parts nothing and makes no tier.
  std::uint32_t n_tiers() const { return n_tiers_; }
  std::uint32_t tier_tokens(std::uint32_t tier) const;  // tokens of a tier, the same in all heads
  std::size_t tier_plane(std::uint32_t head, std::uint32_t plane) const;
  std::uint32_t n_tier_planes() const { return n_tiers_ == 1 ? 0 : n_tiers_ == 2 ? 1 : 2; }

 private:
  // Where a tensor's parts are within a head's codes and within a head's parameters.
  struct TensorOffsets {
    std::array<std::size_t, 2> class_codes{};
    std::array<std::array<std::size_t, 2>, 2> group_codes_size{};  // class, wide channels or others
    std::size_t params = 0;                                        // channel parameters
    std::size_t params_size = 0;
    std::array<std::size_t, 2> class_params{};
    std::size_t token_params = 0;  // from the block start if slot_shared
    std::size_t token_group_size = 0;
    std::size_t base = 0;
    std::size_t order = 0;
    std::size_t low_rank = 0;
    std::size_t outliers = 0;
  };
  const TensorOffsets& offsets(Tensor t) const { return t == Tensor::kKey ? key_ : value_; }
  TensorOffsets place_in_head(Tensor t);
  std::size_t matrix_size(Tensor t, int cls, std::uint32_t group) const;
  void place_token_params(Tensor t, TensorOffsets* offsets);
  void place_corrections(Tensor t, TensorOffsets* offsets);
  void place_shared_params(Tensor t, TensorOffsets* offsets);
  void find_tiers();

  BlockShape shape_;
  TensorOffsets key_, value_;
  std::uint32_t n_tiers_ = 1;
  std::array<std::uint32_t, 4> tier_begin_{};  // slot borders
  std::size_t head_codes_size_ = 0;
  std::size_t head_params_size_ = 0;
  std::size_t params_begin_ = 0;
  std::size_t tiers_begin_ = 0;
  std::size_t tier_plane_size_ = 0;
  std::size_t codes_bytes_ = 0;
  std::size_t params_bytes_ = 0;
  std::size_t total_bytes_ = 0;
};

// The kByte encoding (see TokenParams). encode: nearest representable; scale <= 0 gives e = 0.
// REQUIRES: base > 0.
float byte_scale(float base, std::uint8_t e);
std::uint8_t encode_byte_scale(float base, float scale);
// The `base` for which `largest` is the largest representable scale, rounded to fp16 (saturating);
// 1 where that would be 0.
float byte_scale_base(float largest);
float byte_min(float scale, std::uint8_t z, int bits);
// The same for n tokens.
void byte_params(float base, int bits, const std::uint8_t* e, const std::uint8_t* z, std::size_t n,
                 float* scale, float* min);

// Tier of each token of a head, read from / written to the tier planes. `tiers` is n_tokens long.
void read_tiers(const BlockLayout& layout, const std::byte* block, std::uint32_t head,
                std::uint8_t* tiers);
void write_tiers(const BlockLayout& layout, std::byte* block, std::uint32_t head,
                 const std::uint8_t* tiers);

// Slot -> token index of a head. `order` is n_tokens long.
// REQUIRES: the planes hold as many tokens of each tier as the layout says.
void slot_order(const BlockLayout& layout, const std::byte* block, std::uint32_t head,
                std::uint32_t* order);

// Channels of a head in stored order: wide channels, then the others, each ascending; 0, 1, 2, ...
// where there are none, unless the tensor is reordered. `order` is head_dim long.
// REQUIRES: the wide mask has as many bits as the layout says.
void channel_order(const BlockLayout& layout, const std::byte* block, Tensor t, std::uint32_t head,
                   std::uint16_t* order);

// Writes which channels of a head are wide: `wide` is wide_channels long, in any order.
void write_wide_mask(const BlockLayout& layout, std::byte* block, Tensor t, std::uint32_t head,
                     const std::uint16_t* wide);

// Copies a tensor's codes and parameters of a head. REQUIRES: both layouts have the same format for
// it, the same tokens, heads and dims.
void copy_tensor(const BlockLayout& from, const std::byte* block, const BlockLayout& to,
                 std::byte* out, Tensor t, std::uint32_t head);

// Whether a block from outside (a snapshot) can be used safely: every head has the layout's tier
// and wide channel counts, every fp16 parameter is finite, and every stored place exists.
bool is_sound(const BlockLayout& layout, const std::byte* block);

}  // namespace zipcache::format
