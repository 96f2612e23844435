// Decoding one tensor: unpack a head's codes, put each slot's values at its token's place.

#include <cstring>
#include <vector>

#include "base/aligned.h"
#include "base/check.h"
#include "format/block_params.h"
#include "quant/block_codec.h"
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

class TensorDecoder {
 public:
  TensorDecoder(const BlockLayout& layout, Tensor tensor, const std::byte* block,
                std::span<float> output)
      : layout_(layout),
        tensor_(tensor),
        format_(layout.tensor(tensor)),
        block_(block),
        output_(output),
        n_tokens_(layout.shape().n_tokens),
        n_channels_(layout.head_dim(tensor)),
        order_(n_tokens_),
        codes_(n_tokens_ * n_channels_),
        transposed_(tensor == Tensor::kValue ? codes_.size() : 0) {}

  void decode() {
    for (std::uint32_t head = 0; head < layout_.shape().n_kv_heads; ++head) {
      format::slot_order(layout_, block_, head, order_.data());
      for (int cls = 0; cls < format_.n_classes; ++cls) {
        for (std::uint32_t group = 0; group < layout_.n_groups(tensor_); ++group) {
          unpack(head, cls, group);
          if (format_.granularity == Granularity::kChannelwise) {
            decode_channelwise(head, cls);
          } else {
            decode_tokenwise(head, cls, group);
          }
        }
      }
    }
  }

 private:
  // The block's matrix -> codes_ [slots of the class][channels of the group].
  void unpack(std::uint32_t head, int cls, std::uint32_t group) {
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    const std::size_t width = layout_.group_channels(tensor_);
    const std::span<const std::byte> packed{block_ + layout_.codes(tensor_, head, cls, group),
                                            layout_.codes_size(tensor_, cls)};
    if (tensor_ == Tensor::kKey) {
      format::unpack_codes(format_.bits[cls], n_slots, width, packed,
                           {codes_.data(), n_slots * width});
    } else {
      format::unpack_codes(format_.bits[cls], width, n_slots, packed,
                           {transposed_.data(), n_slots * width});
      transpose(transposed_.data(), width, n_slots, codes_.data());
    }
  }

  // Where the values of a slot of the head go.
  float* destination(std::uint32_t head, std::size_t slot) {
    const std::size_t row = order_[slot] * layout_.shape().n_kv_heads + head;
    return &output_[row * n_channels_];
  }

  void decode_channelwise(std::uint32_t head, int cls) {
    const auto params =
        load_halves(block_ + layout_.channel_scale_min(tensor_, head, cls), 2 * n_channels_);
    const float* scale = params.data();
    const float* min = scale + n_channels_;
    const std::size_t first = layout_.first_slot(tensor_, cls);
    for (std::size_t slot = 0; slot < layout_.class_tokens(tensor_, cls); ++slot) {
      const std::uint8_t* codes = &codes_[slot * n_channels_];
      float* out = destination(head, first + slot);
      for (std::size_t c = 0; c < n_channels_; ++c) {
        out[c] = scale[c] * codes[c] + min[c];
      }
    }
  }

  void decode_tokenwise(std::uint32_t head, int cls, std::uint32_t group) {
    const std::size_t width = layout_.group_channels(tensor_);
    const std::size_t first = layout_.first_slot(tensor_, cls);
    const std::size_t n_slots = layout_.class_tokens(tensor_, cls);
    AlignedVector<float> scales(n_slots), mins(n_slots);
    format::load_token_params(layout_, block_, tensor_, head, cls, group, scales.data(),
                              mins.data());
    const bool separable = format_.granularity == Granularity::kChannelSeparable;
    const AlignedVector<float> factors =
        separable ? load_halves(block_ + layout_.channel_factor(tensor_, head, cls), n_channels_)
                  : AlignedVector<float>(n_channels_, 1.0f);
    const float* factor = &factors[group * width];
    for (std::size_t slot = 0; slot < n_slots; ++slot) {
      const float scale = scales[slot];
      const float min = mins[slot];
      const std::uint8_t* codes = &codes_[slot * width];
      float* out = destination(head, first + slot) + group * width;
      for (std::size_t c = 0; c < width; ++c) {
        out[c] = factor[c] * (scale * codes[c] + min);
      }
    }
  }

  const BlockLayout& layout_;
  const Tensor tensor_;
  const format::TensorFormat& format_;
  const std::byte* const block_;
  const std::span<float> output_;
  const std::size_t n_tokens_;
  const std::size_t n_channels_;
  std::vector<std::uint32_t> order_;
  std::vector<std::uint8_t> codes_, transposed_;
};

}  // namespace

void decode_block(const BlockLayout& layout, const std::byte* block, std::span<float> keys,
                  std::span<float> values) {
  const std::size_t rows = std::size_t{layout.shape().n_tokens} * layout.shape().n_kv_heads;
  ZC_CHECK(keys.empty() || keys.size() == rows * layout.shape().key_dim);
  ZC_CHECK(values.empty() || values.size() == rows * layout.shape().value_dim);
  if (!keys.empty()) {
    TensorDecoder(layout, Tensor::kKey, block, keys).decode();
  }
  if (!values.empty()) {
    TensorDecoder(layout, Tensor::kValue, block, values).decode();
  }
}

}  // namespace zipcache::quant
