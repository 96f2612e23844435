// Where everything inside a sealed block stands; the sections are listed in block.h.

#include "format/block.h"

#include <algorithm>

#include "base/aligned.h"
#include "base/check.h"

namespace zipcache::format {
namespace {

constexpr std::uint32_t kMaxHeadDim = 512;
constexpr std::uint32_t kMaxTokens = 1u << 24;  // with kMaxHeads: no size overflows 64 bits
constexpr std::uint32_t kMaxHeads = 1u << 12;
constexpr std::uint32_t kMaxPlaces = 1u << 16;
constexpr std::size_t kParamsAlignment = 16;

// Bytes of one matrix of a class.
std::size_t class_matrix_bytes(int bits, std::size_t lanes, std::size_t inner) {
  switch (bits) {
    case kEvictedBits:
      return 0;
    case kExactBits:
      return round_up(lanes * inner * sizeof(Half), kAlignmentBytes);
    default:
      return matrix_bytes(bits, lanes, inner);
  }
}

bool is_multiple_of_16(std::uint32_t n) { return n > 0 && n % 16 == 0; }

bool is_valid_tensor(const TensorFormat& f, std::uint32_t head_dim, std::uint32_t n_tokens) {
  if (!is_multiple_of_16(head_dim) || head_dim > kMaxHeadDim) {
    return false;
  }
  if (f.n_classes < 1 || f.n_classes > 2 || !is_class_width(f.bits[0]) ||
      f.bits[0] == kEvictedBits) {
    return false;
  }
  if (f.n_classes == 2 && (!is_class_width(f.bits[1]) || f.class0_tokens > n_tokens)) {
    return false;
  }
  if (f.token_params != TokenParams::kHalf && f.token_params != TokenParams::kByte) {
    return false;
  }
  if ((f.class_factors || f.given_factors) && f.granularity != Granularity::kChannelSeparable) {
    return false;
  }
  if (f.group_tokens % 16 != 0 ||
      (f.group_tokens != 0 && f.granularity != Granularity::kChannelwise)) {
    return false;
  }
  if (f.slot_shared &&
      (!is_code_width(f.bits[0]) || (f.n_classes == 2 && !is_code_width(f.bits[1])))) {
    return false;
  }
  if (f.wide_channels != 0 &&
      (f.granularity != Granularity::kChannelwise || f.wide_channels % 16 != 0 ||
       f.wide_channels >= head_dim || !is_code_width(f.wide_bits) || !is_code_width(f.bits[0]) ||
       (f.n_classes == 2 && !is_code_width(f.bits[1])) || f.reordered || f.rank > 0 ||
       f.outliers > 0)) {
    return false;
  }
  const bool one_group = f.group_channels == 0 || f.group_channels == head_dim;
  switch (f.granularity) {
    case Granularity::kChannelwise:
      return one_group && !f.slot_shared && f.token_params == TokenParams::kHalf;
    case Granularity::kTokenwise:
    case Granularity::kChannelSeparable:
      if (!one_group &&
          (!is_multiple_of_16(f.group_channels) || head_dim % f.group_channels != 0)) {
        return false;
      }
      return !f.slot_shared || (one_group && f.token_params == TokenParams::kHalf);
  }
  return false;  // a granularity that does not exist
}

// What only both tensors together can be.
bool is_valid_pair(const BlockShape& s) {
  const auto evicts = [](const TensorFormat& f) {
    return f.n_classes == 2 && f.bits[1] == kEvictedBits;
  };
  if (evicts(s.key) != evicts(s.value) ||
      (evicts(s.key) && s.key.class0_tokens != s.value.class0_tokens)) {
    return false;
  }
  const bool corrected =
      s.key.rank > 0 || s.key.outliers > 0 || s.value.rank > 0 || s.value.outliers > 0;
  return s.value.group_tokens == 0 && s.value.wide_channels == 0 && s.key.outliers <= s.n_tokens &&
         s.value.outliers <= s.value_dim &&
         (!corrected ||
          (s.key.n_classes == 1 && s.value.n_classes == 1 && s.n_tokens <= kMaxPlaces));
}

}  // namespace

bool BlockLayout::is_valid(const BlockShape& shape) {
  return shape.n_tokens > 0 && shape.n_tokens <= kMaxTokens && shape.n_kv_heads > 0 &&
         shape.n_kv_heads <= kMaxHeads &&
         is_valid_tensor(shape.key, shape.key_dim, shape.n_tokens) &&
         is_valid_tensor(shape.value, shape.value_dim, shape.n_tokens) && is_valid_pair(shape);
}

BlockLayout::BlockLayout(const BlockShape& shape) : shape_(shape) {
  ZC_CHECK(is_valid(shape));
  find_tiers();
  key_ = place_in_head(Tensor::kKey);
  value_ = place_in_head(Tensor::kValue);
  head_params_size_ = round_up(head_params_size_, kParamsAlignment);
  codes_bytes_ = head_codes_size_ * shape.n_kv_heads;

  params_begin_ = codes_bytes_;  // a multiple of 64: code matrices are
  total_bytes_ = round_up(params_begin_ + head_params_size_ * shape.n_kv_heads, kAlignmentBytes);
  place_shared_params(Tensor::kKey, &key_);
  place_shared_params(Tensor::kValue, &value_);
  total_bytes_ = round_up(total_bytes_, kAlignmentBytes);
  params_bytes_ = total_bytes_ - params_begin_;

  tiers_begin_ = total_bytes_;
  tier_plane_size_ = round_up(shape.n_tokens, 64) / 8;
  total_bytes_ += round_up(tier_plane_size_ * n_tier_planes() * shape.n_kv_heads, kAlignmentBytes);
}

// Slots between the distinct class borders.
void BlockLayout::find_tiers() {
  std::array<std::uint32_t, 2> borders{first_slot(Tensor::kKey, 1), first_slot(Tensor::kValue, 1)};
  std::sort(borders.begin(), borders.end());
  n_tiers_ = 0;
  for (const std::uint32_t border : borders) {
    if (border > tier_begin_[n_tiers_] && border < shape_.n_tokens) {
      tier_begin_[++n_tiers_] = border;
    }
  }
  tier_begin_[++n_tiers_] = shape_.n_tokens;
}

// Appends a tensor's codes and parameters to those of a head.
BlockLayout::TensorOffsets BlockLayout::place_in_head(Tensor t) {
  const TensorFormat& f = tensor(t);
  TensorOffsets o;
  for (int cls = 0; cls < f.n_classes; ++cls) {
    o.class_codes[cls] = head_codes_size_;
    for (std::uint32_t group = 0; group < n_groups(t); ++group) {
      const std::size_t size = matrix_size(t, cls, group);
      o.group_codes_size[cls][std::min(group, 1u)] = size;
      head_codes_size_ += size;
    }
  }

  o.params = head_params_size_;
  if (f.granularity == Granularity::kChannelwise) {
    for (int cls = 0; cls < f.n_classes; ++cls) {
      o.class_params[cls] = head_params_size_;
      head_params_size_ += n_token_groups(t, cls) * 2 * head_dim(t) * sizeof(Half);
    }
  } else {
    place_token_params(t, &o);
  }
  place_corrections(t, &o);
  o.params_size = head_params_size_ - o.params;
  return o;
}

std::size_t BlockLayout::matrix_size(Tensor t, int cls, std::uint32_t group) const {
  const std::size_t tokens = class_tokens(t, cls), channels = group_channels(t, group);
  const int bits = code_bits(t, cls, group);
  return t == Tensor::kKey ? class_matrix_bytes(bits, tokens, channels)
                           : class_matrix_bytes(bits, channels, tokens);
}

void BlockLayout::place_token_params(Tensor t, TensorOffsets* o) {
  const TensorFormat& f = tensor(t);
  if (param_slots(t) == 0) {
    return;  // all tokens exact or evicted
  }
  if (f.granularity == Granularity::kChannelSeparable) {
    head_params_size_ += (f.class_factors ? f.n_classes : 1) * head_dim(t) * sizeof(Half);
  }
  const std::size_t one = f.token_params == TokenParams::kHalf ? sizeof(Half) : 1;
  o->token_group_size = 2 * one * param_slots(t);
  if (!f.slot_shared) {
    o->token_params = head_params_size_;
    head_params_size_ += n_groups(t) * o->token_group_size;
  }
  if (f.token_params == TokenParams::kByte) {
    o->base = head_params_size_;
    head_params_size_ += f.n_classes * sizeof(Half);
  }
}

void BlockLayout::place_corrections(Tensor t, TensorOffsets* o) {
  const TensorFormat& f = tensor(t);
  head_params_size_ = round_up(head_params_size_, sizeof(Half));  // after an odd number of bytes
  o->order = head_params_size_;
  head_params_size_ += f.reordered           ? head_dim(t) * sizeof(std::uint16_t)
                       : f.wide_channels > 0 ? head_dim(t) / 8
                                             : 0;
  o->low_rank = head_params_size_;
  head_params_size_ += f.rank * (std::size_t{shape_.n_tokens} + head_dim(t)) * sizeof(Half);
  o->outliers = head_params_size_;
  head_params_size_ +=
      std::size_t{outlier_vectors(t)} * f.outliers * (sizeof(std::uint16_t) + sizeof(Half));
}

void BlockLayout::place_shared_params(Tensor t, TensorOffsets* offsets) {
  if (tensor(t).slot_shared) {
    offsets->token_params = total_bytes_;
    total_bytes_ += round_up(offsets->token_group_size, kParamsAlignment);
  }
}

std::uint32_t BlockLayout::first_slot(Tensor t, int cls) const {
  const TensorFormat& f = tensor(t);
  if (cls == 0) {
    return 0;
  }
  return f.n_classes == 2 ? f.class0_tokens : shape_.n_tokens;
}

std::uint32_t BlockLayout::class_tokens(Tensor t, int cls) const {
  const std::uint32_t end = cls == 0 ? first_slot(t, 1) : shape_.n_tokens;
  return end - first_slot(t, cls);
}

std::uint32_t BlockLayout::group_channels(Tensor t) const {
  ZC_CHECK(tensor(t).wide_channels == 0);
  const std::uint32_t group = tensor(t).group_channels;
  return group == 0 ? head_dim(t) : group;
}

std::uint32_t BlockLayout::n_groups(Tensor t) const {
  return tensor(t).wide_channels > 0 ? 2 : head_dim(t) / group_channels(t);
}

std::uint32_t BlockLayout::first_channel(Tensor t, std::uint32_t group) const {
  const std::uint32_t wide = tensor(t).wide_channels;
  return group * (wide > 0 ? wide : group_channels(t));
}

std::uint32_t BlockLayout::group_channels(Tensor t, std::uint32_t group) const {
  const std::uint32_t wide = tensor(t).wide_channels;
  return wide == 0 ? group_channels(t) : group == 0 ? wide : head_dim(t) - wide;
}

int BlockLayout::code_bits(Tensor t, int cls, std::uint32_t group) const {
  const TensorFormat& f = tensor(t);
  return f.wide_channels > 0 && group == 0 ? f.wide_bits : f.bits[static_cast<std::size_t>(cls)];
}

std::uint32_t BlockLayout::group_tokens(Tensor t, int cls) const {
  const std::uint32_t group = tensor(t).group_tokens;
  return group == 0 ? std::max(class_tokens(t, cls), 1u) : group;
}

std::uint32_t BlockLayout::n_token_groups(Tensor t, int cls) const {
  const std::uint32_t group = group_tokens(t, cls);
  return has_codes(t, cls) ? (class_tokens(t, cls) + group - 1) / group : 0;
}

std::uint32_t BlockLayout::first_param_slot(Tensor t) const {
  return has_codes(t, 0) ? 0 : first_slot(t, 1);
}

std::uint32_t BlockLayout::param_slots(Tensor t) const {
  const bool second = tensor(t).n_classes == 2 && has_codes(t, 1);
  return (has_codes(t, 0) ? class_tokens(t, 0) : 0) + (second ? class_tokens(t, 1) : 0);
}

std::size_t BlockLayout::codes(Tensor t, std::uint32_t head, int cls, std::uint32_t group) const {
  const TensorOffsets& o = offsets(t);
  return head * head_codes_size_ + o.class_codes[cls] + group * o.group_codes_size[cls][0];
}

std::size_t BlockLayout::codes_size(Tensor t, int cls, std::uint32_t group) const {
  return offsets(t).group_codes_size[cls][std::min(group, 1u)];
}

std::size_t BlockLayout::params(Tensor t, std::uint32_t head) const {
  return params_begin_ + head * head_params_size_ + offsets(t).params;
}

std::size_t BlockLayout::channel_scale_min(Tensor t, std::uint32_t head, int cls,
                                           std::uint32_t token_group) const {
  ZC_CHECK(tensor(t).granularity == Granularity::kChannelwise);
  return params_begin_ + head * head_params_size_ + offsets(t).class_params[cls] +
         std::size_t{token_group} * 2 * head_dim(t) * sizeof(Half);
}

std::size_t BlockLayout::channel_factor(Tensor t, std::uint32_t head, int cls) const {
  ZC_CHECK(tensor(t).granularity == Granularity::kChannelSeparable);
  const std::size_t set = tensor(t).class_factors ? static_cast<std::size_t>(cls) : 0;
  return params_begin_ + head * head_params_size_ + offsets(t).params +
         set * head_dim(t) * sizeof(Half);
}

std::size_t BlockLayout::token_scale_min(Tensor t, std::uint32_t head, std::uint32_t group) const {
  ZC_CHECK(tensor(t).granularity != Granularity::kChannelwise);
  const TensorOffsets& o = offsets(t);
  if (tensor(t).slot_shared) {
    return o.token_params;
  }
  return params_begin_ + head * head_params_size_ + o.token_params + group * o.token_group_size;
}

std::size_t BlockLayout::token_base(Tensor t, std::uint32_t head) const {
  ZC_CHECK(tensor(t).token_params == TokenParams::kByte);
  return params_begin_ + head * head_params_size_ + offsets(t).base;
}

std::size_t BlockLayout::channel_order(Tensor t, std::uint32_t head) const {
  ZC_CHECK(tensor(t).reordered);
  return params_begin_ + head * head_params_size_ + offsets(t).order;
}

std::size_t BlockLayout::wide_mask(Tensor t, std::uint32_t head) const {
  ZC_CHECK(tensor(t).wide_channels > 0);
  return params_begin_ + head * head_params_size_ + offsets(t).order;
}

std::size_t BlockLayout::low_rank(Tensor t, std::uint32_t head) const {
  return params_begin_ + head * head_params_size_ + offsets(t).low_rank;
}

std::size_t BlockLayout::outliers(Tensor t, std::uint32_t head) const {
  return params_begin_ + head * head_params_size_ + offsets(t).outliers;
}

std::uint32_t BlockLayout::tier_tokens(std::uint32_t tier) const {
  ZC_CHECK(tier < n_tiers_);
  return tier_begin_[tier + 1] - tier_begin_[tier];
}

std::size_t BlockLayout::tier_plane(std::uint32_t head, std::uint32_t plane) const {
  ZC_CHECK(plane < n_tier_planes());
  return tiers_begin_ + (head * n_tier_planes() + plane) * tier_plane_size_;
}

}  // namespace zipcache::format
