// Decoding one tensor: unpack a head's codes, add its corrections, put each slot's values at its
// token's place.

#include <algorithm>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "format/block_params.h"
#include "quant/block_codec.h"
#include "quant/corrections.h"
#include "quant/decode_codes.h"
#include "quant/row_ops.h"

namespace zipcache::quant {
namespace {

using format::BlockLayout;
using format::Granularity;
using format::Tensor;

AlignedVector<float> load_halves(const std::byte* from, std::size_t n) {
  AlignedVector<float> out(n);
  format::load_halves(from, n, out.data());
  return out;
}

class HeadDecoder {
 public:
  HeadDecoder(const BlockLayout& layout, Tensor tensor, const std::byte* block, std::uint32_t head,
              float* rows)
      : layout_(layout),
        tensor_(tensor),
        format_(layout.tensor(tensor)),
        block_(block),
        head_(head),
        rows_(rows),
        n_channels_(layout.head_dim(tensor)) {}

  void decode() {
    const std::size_t n_elements = layout_.shape().n_tokens * n_channels_;
    codes_.resize(n_elements);
    transposed_.resize(tensor_ == Tensor::kValue ? n_elements : 0);
    for (int cls = 0; cls < format_.n_classes; ++cls) {
      if (layout_.class_tokens(tensor_, cls) == 0) {
        continue;
      }
      if (format_.bits[cls] == format::kEvictedBits) {
        std::fill_n(row(cls, 0), layout_.class_tokens(tensor_, cls) * n_channels_, 0.0f);
        continue;
      }
      for (std::uint32_t group = 0; group < layout_.n_groups(tensor_); ++group) {
        if (format_.bits[cls] == format::kExactBits) {
          read_exact(cls, group);
          continue;
        }
        unpack(cls, group);
        if (format_.granularity == Granularity::kChannelwise) {
          decode_channelwise(cls, group);
        } else {
          decode_tokenwise(cls, group);
        }
      }
    }
  }

 private:
  float* row(int cls, std::size_t slot) {
    return rows_ + (layout_.first_slot(tensor_, cls) + slot) * n_channels_;
  }

  void read_exact(int cls, std::uint32_t group) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t width = layout_.group_channels(tensor_);
    const std::byte* stored = block_ + layout_.codes(tensor_, head_, cls, group);
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      for (std::size_t c = 0; c < width; ++c) {
        const std::size_t at = tensor_ == Tensor::kKey ? c * n_slots + slot : slot * width + c;
        format::load_halves(stored + at * sizeof(Half), 1, row(cls, slot) + group * width + c);
      }
    }
  }

  // The block's matrix -> codes_ [slots of the class][channels of the group].
  void unpack(int cls, std::uint32_t group) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t width = layout_.group_channels(tensor_, group);
    const int bits = layout_.code_bits(tensor_, cls, group);
    const std::span<const std::byte> packed{block_ + layout_.codes(tensor_, head_, cls, group),
                                            layout_.codes_size(tensor_, cls, group)};
    if (tensor_ == Tensor::kKey) {
      format::unpack_codes(bits, n_slots, width, packed, {codes_.data(), n_slots * width});
    } else {
      format::unpack_codes(bits, width, n_slots, packed, {transposed_.data(), n_slots * width});
      transpose(transposed_.data(), width, n_slots, codes_.data());
    }
  }

  void decode_channelwise(int cls, std::uint32_t group) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t step = layout_.group_tokens(tensor_, cls);
    const std::size_t first = layout_.first_channel(tensor_, group);
    const std::size_t width = layout_.group_channels(tensor_, group);
    for (std::uint32_t set = 0; set < layout_.n_token_groups(tensor_, cls); ++set) {
      const auto params = load_halves(block_ + layout_.channel_scale_min(tensor_, head_, cls, set),
                                      2 * n_channels_);
      const float* scale = params.data() + first;
      const float* min = scale + n_channels_;
      for (std::size_t slot = set * step; slot < std::min((set + 1) * step, n_slots); ++slot) {
        const std::uint8_t* codes = &codes_[slot * width];
        float* out = row(cls, slot) + first;
        for (std::size_t c = 0; c < width; ++c) {
          out[c] = scale[c] * codes[c] + min[c];
        }
      }
    }
  }

  void decode_tokenwise(int cls, std::uint32_t group) {
    const std::size_t width = layout_.group_channels(tensor_);
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    AlignedVector<float> scales(n_slots), mins(n_slots);
    format::load_token_params(layout_, block_, tensor_, head_, cls, group, scales.data(),
                              mins.data());
    const bool separable = format_.granularity == Granularity::kChannelSeparable;
    const AlignedVector<float> factors =
        separable ? load_halves(block_ + layout_.channel_factor(tensor_, head_, cls), n_channels_)
                  : AlignedVector<float>(n_channels_, 1.0f);
    const float* factor = &factors[group * width];
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      const float scale = scales[slot];
      const float min = mins[slot];
      const std::uint8_t* codes = &codes_[slot * width];
      float* out = row(cls, slot) + group * width;
      for (std::size_t c = 0; c < width; ++c) {
        out[c] = factor[c] * (scale * codes[c] + min);
      }
    }
  }

  const BlockLayout& layout_;
  const Tensor tensor_;
  const format::TensorFormat& format_;
  const std::byte* const block_;
  const std::uint32_t head_;
  float* const rows_;
  const std::size_t n_channels_;
  std::vector<std::uint8_t> codes_, transposed_;
};

// All heads, in token order.
void decode_tensor(const BlockLayout& layout, Tensor t, const std::byte* block,
                   std::span<float> output) {
  const std::size_t n_tokens = layout.shape().n_tokens, n_channels = layout.head_dim(t);
  AlignedVector<float> rows(n_tokens * n_channels);
  std::vector<std::uint32_t> order(n_tokens);
  std::vector<std::uint16_t> channels(n_channels);
  for (std::uint32_t head = 0; head < layout.shape().n_kv_heads; ++head) {
    decode_codes(layout, t, block, head, rows.data());
    add_corrections(layout, t, block, head, rows.data());
    format::slot_order(layout, block, head, order.data());
    format::channel_order(layout, block, t, head, channels.data());
    for (std::size_t slot = 0; slot < n_tokens; ++slot) {
      float* out = &output[(order[slot] * layout.shape().n_kv_heads + head) * n_channels];
      for (std::size_t c = 0; c < n_channels; ++c) {
        out[channels[c]] = rows[slot * n_channels + c];
      }
    }
  }
}

}  // namespace

void decode_codes(const BlockLayout& layout, Tensor t, const std::byte* block, std::uint32_t head,
                  float* rows) {
  HeadDecoder(layout, t, block, head, rows).decode();
}

void decode_block(const BlockLayout& layout, const std::byte* block, std::span<float> keys,
                  std::span<float> values) {
  const std::size_t rows = std::size_t{layout.shape().n_tokens} * layout.shape().n_kv_heads;
  ZC_CHECK(keys.empty() || keys.size() == rows * layout.shape().key_dim);
  ZC_CHECK(values.empty() || values.size() == rows * layout.shape().value_dim);
  if (!keys.empty()) {
    decode_tensor(layout, Tensor::kKey, block, keys);
  }
  if (!values.empty()) {
    decode_tensor(layout, Tensor::kValue, block, values);
  }
}

}  // namespace zipcache::quant
