#include "cache/segment_math.h"

#include <algorithm>
#include <limits>

#include "format/block_params.h"
#include "quant/byte_rows.h"

namespace zipcache::cache {
namespace {

using format::BlockLayout;
using format::Granularity;
using format::Tensor;

const std::byte* at(const SealedBlock& block, std::size_t offset) {
  return block.bytes.data() + offset;
}

// 256 + code as a half: exact, and vector code of a few instructions. No smaller power of two has
// room for 256 codes, and a larger one would cost digits of the sums.
void codes_to_halves(const std::uint8_t* codes, std::size_t n, Half* halves) {
  for (std::size_t i = 0; i < n; ++i) {
    halves[i] = static_cast<Half>(0x5c00u | (codes[i] << 2));
  }
}
constexpr double kCodeOffset = 256.0 + quant::kByteZero;

}  // namespace

void SegmentScratch::resize(std::size_t n_rows, std::size_t max_tokens, std::size_t max_dim) {
  const std::size_t widest = round_up(std::max(max_tokens, max_dim), 32) + 32;
  operand.resize(n_rows * widest);
  product.resize(n_rows * widest);
  token_scale.resize(widest);
  token_min.resize(widest);
  channel_a.resize(round_up(max_dim, 16));
  channel_b.resize(round_up(max_dim, 16));
  reordered.resize(n_rows * round_up(max_dim, 16));
  order.resize(max_dim);
  page.resize(max_dim * kPageTokens);
  kernel.resize(kernels::matmul_scratch_bytes(n_rows, widest));
}

void SegmentMath::multiply(const kernels::MatrixView& matrix, const float* x, std::size_t x_stride,
                           std::size_t n_rows, float* y, std::size_t y_stride,
                           SegmentScratch& scratch) const {
  kernels_.matmul(matrix, x, x_stride, n_rows, y, y_stride,
                  {scratch.kernel.data(), scratch.kernel.size()});
}

void SegmentMath::logits(const Segment& segment, std::uint32_t head, const float* q,
                         std::size_t n_rows, float* logits, std::size_t stride,
                         SegmentScratch& scratch) const {
  if (segment.page != nullptr) {
    page_logits(*segment.page, head, q, n_rows, logits, stride, scratch);
    return;
  }
  block_logits(*segment.block, head, q, n_rows, logits, stride, scratch);
}

// The code of a packed row, put into the mantissa, is the half 256 + code: the product is that of
// an exact page, and what was added comes off as one number per query row.
void SegmentMath::page_logits(const StagingPage& page, std::uint32_t head, const float* q,
                              std::size_t n_rows, float* logits, std::size_t stride,
                              SegmentScratch& scratch) const {
  const std::uint32_t n = page.capacity();
  const std::size_t first = std::size_t{head} * key_dim_ * n;
  if (!page.shape.packed) {
    multiply({page.exact_keys() + first, 16, n, key_dim_, n}, q, key_dim_, n_rows, logits, stride,
             scratch);
    return;
  }
  codes_to_halves(page.key_codes() + first, std::size_t{key_dim_} * n, scratch.page.data());
  multiply({scratch.page.data(), 16, n, key_dim_, n}, q, key_dim_, n_rows, logits, stride, scratch);
  halves_to_floats(page.slot_scales(Tensor::kKey, head), n, scratch.token_scale.data());
  for (std::size_t row = 0; row < n_rows; ++row) {
    double sum = 0.0;
    for (std::uint32_t c = 0; c < key_dim_; ++c) {
      sum += q[row * key_dim_ + c];
    }
    const auto added = static_cast<float>(sum * kCodeOffset);
    float* s = logits + row * stride;
    for (std::uint32_t slot = 0; slot < n; ++slot) {
      s[slot] = scratch.token_scale[slot] * (s[slot] - added);
    }
  }
}

void SegmentMath::page_accumulate(const StagingPage& page, std::uint32_t head, const float* weights,
                                  std::size_t stride, std::size_t n_rows, float* out,
                                  SegmentScratch& scratch) const {
  const std::uint32_t n = page.capacity();
  const std::size_t first = std::size_t{head} * value_dim_;
  if (page.has_non_finite) {
    accumulate_one_by_one(page, head, weights, stride, n_rows, out);
    return;
  }
  float* product = scratch.product.data();
  if (!page.shape.packed) {
    multiply({page.exact_values() + first, 16, value_dim_, n, value_row_}, weights, stride, n_rows,
             product, value_dim_, scratch);
    kernels_.axpby(out, n_rows * value_dim_, 1.0f, product, 1.0f);
    return;
  }
  for (std::uint32_t slot = 0; slot < n; ++slot) {
    codes_to_halves(page.value_codes() + std::size_t{slot} * value_row_ + first, value_dim_,
                    scratch.page.data() + std::size_t{slot} * value_dim_);
  }
  halves_to_floats(page.slot_scales(Tensor::kValue, head), n, scratch.token_scale.data());
  for (std::size_t row = 0; row < n_rows; ++row) {
    kernels_.multiply(scratch.operand.data() + row * n, weights + row * stride,
                      scratch.token_scale.data(), n);
  }
  multiply({scratch.page.data(), 16, value_dim_, n, value_dim_}, scratch.operand.data(), n, n_rows,
           product, value_dim_, scratch);
  for (std::size_t row = 0; row < n_rows; ++row) {
    double sum = 0.0;
    for (std::uint32_t slot = 0; slot < n; ++slot) {
      sum += scratch.operand[row * n + slot];
    }
    const auto added = static_cast<float>(sum * kCodeOffset);
    float* o = out + row * value_dim_;
    for (std::uint32_t c = 0; c < value_dim_; ++c) {
      o[c] += product[row * value_dim_ + c] - added;
    }
  }
}

void SegmentMath::block_logits(const SealedBlock& block, std::uint32_t head, const float* q,
                               std::size_t n_rows, float* logits, std::size_t stride,
                               SegmentScratch& scratch) const {
  const format::TensorFormat& format = block.layout->tensor(Tensor::kKey);
  if (format.reordered || format.wide_channels > 0) {
    format::channel_order(*block.layout, block.bytes.data(), Tensor::kKey, head,
                          scratch.order.data());
    for (std::size_t row = 0; row < n_rows; ++row) {
      for (std::uint32_t c = 0; c < key_dim_; ++c) {
        scratch.reordered[row * key_dim_ + c] = q[row * key_dim_ + scratch.order[c]];
      }
    }
    q = scratch.reordered.data();
  }
  // Class 1 comes second: it overwrites the padding lanes behind class 0.
  for (int cls = 0; cls < format.n_classes; ++cls) {
    key_class(block, head, cls, q, n_rows, logits, stride, scratch);
  }
  if (format.rank > 0 || format.outliers > 0) {
    key_corrections(block, head, q, n_rows, logits, stride, scratch);
  }
}

void SegmentMath::key_class(const SealedBlock& block, std::uint32_t head, int cls, const float* q,
                            std::size_t n_rows, float* logits, std::size_t stride,
                            SegmentScratch& scratch) const {
  const BlockLayout& layout = *block.layout;
  const format::TensorFormat& format = layout.tensor(Tensor::kKey);
  const std::uint32_t n = layout.class_tokens(Tensor::kKey, cls);
  if (n == 0) {
    return;
  }
  const int bits = format.bits[static_cast<std::size_t>(cls)];
  float* out = logits + layout.first_slot(Tensor::kKey, cls);
  float* folded = scratch.operand.data();

  if (bits == format::kEvictedBits) {
    for (std::size_t row = 0; row < n_rows; ++row) {
      std::fill_n(out + row * stride, n, -std::numeric_limits<float>::infinity());
    }
    return;
  }
  if (bits == format::kExactBits) {
    multiply({at(block, layout.codes(Tensor::kKey, head, cls, 0)), 16, n, key_dim_, n}, q, key_dim_,
             n_rows, out, stride, scratch);
    return;
  }
  if (format.granularity == Granularity::kChannelwise) {
    for (std::uint32_t set = 0; set < layout.n_token_groups(Tensor::kKey, cls); ++set) {
      key_channels(block, head, cls, set, q, n_rows, out, stride, scratch);
    }
    return;
  }

  const std::uint32_t width = layout.group_channels(Tensor::kKey);
  const std::size_t inner = format::padded_inner(bits, width);
  if (format.granularity == Granularity::kChannelSeparable) {
    format::load_halves(at(block, layout.channel_factor(Tensor::kKey, head, cls)), key_dim_,
                        scratch.channel_a.data());
  } else {
    std::fill_n(scratch.channel_a.begin(), key_dim_, 1.0f);
  }
  for (std::uint32_t group = 0; group < layout.n_groups(Tensor::kKey); ++group) {
    const std::size_t first_channel = std::size_t{group} * width;
    format::load_token_params(layout, block.bytes.data(), Tensor::kKey, head, cls, group,
                              scratch.token_scale.data(), scratch.token_min.data());
    for (std::size_t row = 0; row < n_rows; ++row) {
      float* x = folded + row * inner;
      kernels_.multiply(x, q + row * key_dim_ + first_channel,
                        scratch.channel_a.data() + first_channel, width);
      std::fill(x + width, x + inner, 0.0f);
    }
    const std::size_t product_stride = round_up(n, 16);
    multiply({at(block, layout.codes(Tensor::kKey, head, cls, group)), bits, n, width, 0}, folded,
             inner, n_rows, scratch.product.data(), product_stride, scratch);
    for (std::size_t row = 0; row < n_rows; ++row) {
      const float* product = scratch.product.data() + row * product_stride;
      const float* x = folded + row * inner;
      float sum = 0.0f;
      for (std::uint32_t c = 0; c < width; ++c) {
        sum += x[c];
      }
      float* s = out + row * stride;
      for (std::uint32_t i = 0; i < n; ++i) {
        const float part = scratch.token_scale[i] * product[i] + scratch.token_min[i] * sum;
        s[i] = group == 0 ? part : s[i] + part;
      }
    }
  }
}

// Slots of a class that share a (scale, min) per channel: the lanes of a part of its code matrices,
// one of which has the wide channels, if there are any, and one the others.
void SegmentMath::key_channels(const SealedBlock& block, std::uint32_t head, int cls,
                               std::uint32_t set, const float* q, std::size_t n_rows, float* logits,
                               std::size_t stride, SegmentScratch& scratch) const {
  const BlockLayout& layout = *block.layout;
  const std::uint32_t first = set * layout.group_tokens(Tensor::kKey, cls);
  const std::uint32_t n = std::min(layout.group_tokens(Tensor::kKey, cls),
                                   layout.class_tokens(Tensor::kKey, cls) - first);
  const std::size_t lane_groups = first / format::kLanesPerGroup;
  const std::byte* params = at(block, layout.channel_scale_min(Tensor::kKey, head, cls, set));
  float* out = logits + first;
  float* folded = scratch.operand.data();
  format::load_halves(params, key_dim_, scratch.channel_a.data());
  format::load_halves(params + key_dim_ * sizeof(Half), key_dim_, scratch.channel_b.data());
  for (std::uint32_t group = 0; group < layout.n_groups(Tensor::kKey); ++group) {
    const int bits = layout.code_bits(Tensor::kKey, cls, group);
    const std::uint32_t first_channel = layout.first_channel(Tensor::kKey, group);
    const std::uint32_t width = layout.group_channels(Tensor::kKey, group);
    const std::byte* codes =
        at(block, layout.codes(Tensor::kKey, head, cls, group)) +
        lane_groups * format::group_words(bits, width) * format::kGroupWordBytes;
    const std::size_t inner = format::padded_inner(bits, width);
    for (std::size_t row = 0; row < n_rows; ++row) {
      float* x = folded + row * inner;
      kernels_.multiply(x, q + row * key_dim_ + first_channel,
                        scratch.channel_a.data() + first_channel, width);
      std::fill(x + width, x + inner, 0.0f);
    }
    const std::size_t product_stride = group == 0 ? stride : round_up(n, 16);
    float* product = group == 0 ? out : scratch.product.data();
    multiply({codes, bits, n, width, 0}, folded, inner, n_rows, product, product_stride, scratch);
    for (std::size_t row = 0; group > 0 && row < n_rows; ++row) {
      kernels_.axpby(out + row * stride, n, 1.0f, product + row * product_stride, 1.0f);
    }
  }
  for (std::size_t row = 0; row < n_rows; ++row) {
    const float beta = kernels_.dot(q + row * key_dim_, scratch.channel_b.data(), key_dim_);
    float* s = out + row * stride;
    for (std::uint32_t i = 0; i < n; ++i) {
      s[i] += beta;
    }
  }
}

// Low rank: q . (channel x token) = (q . channel) x token, two small products with fp16. Outliers:
// a sparse sum.
void SegmentMath::key_corrections(const SealedBlock& block, std::uint32_t head, const float* q,
                                  std::size_t n_rows, float* logits, std::size_t stride,
                                  SegmentScratch& scratch) const {
  const BlockLayout& layout = *block.layout;
  const format::TensorFormat& format = layout.tensor(Tensor::kKey);
  const std::uint32_t n = layout.shape().n_tokens;
  const std::uint32_t rank = format.rank;
  if (rank > 0) {
    const std::byte* token = at(block, layout.low_rank(Tensor::kKey, head));
    const std::byte* channel = token + std::size_t{rank} * n * sizeof(Half);
    for (std::uint32_t r = 0; r < rank; ++r) {
      format::load_halves(channel + std::size_t{r} * key_dim_ * sizeof(Half), key_dim_,
                          scratch.channel_a.data());
      for (std::size_t row = 0; row < n_rows; ++row) {
        scratch.operand[row * rank + r] =
            kernels_.dot(q + row * key_dim_, scratch.channel_a.data(), key_dim_);
      }
    }
    const std::size_t product_stride = round_up(n, 16);
    multiply({token, 16, n, rank, n}, scratch.operand.data(), rank, n_rows, scratch.product.data(),
             product_stride, scratch);
    for (std::size_t row = 0; row < n_rows; ++row) {
      kernels_.axpby(logits + row * stride, n, 1.0f, scratch.product.data() + row * product_stride,
                     1.0f);
    }
  }
  format::for_each_outlier(layout, block.bytes.data(), Tensor::kKey, head,
                           [&](std::uint32_t channel, std::uint32_t slot, float value) {
                             for (std::size_t row = 0; row < n_rows; ++row) {
                               logits[row * stride + slot] += q[row * key_dim_ + channel] * value;
                             }
                           });
}

void SegmentMath::value_corrections(const SealedBlock& block, std::uint32_t head,
                                    const float* weights, std::size_t stride, std::size_t n_rows,
                                    float* out, SegmentScratch& scratch) const {
  const BlockLayout& layout = *block.layout;
  const format::TensorFormat& format = layout.tensor(Tensor::kValue);
  const std::uint32_t n = layout.shape().n_tokens;
  const std::uint32_t rank = format.rank;
  if (rank > 0) {
    const std::byte* token = at(block, layout.low_rank(Tensor::kValue, head));
    const std::byte* channel = token + std::size_t{rank} * n * sizeof(Half);
    for (std::uint32_t r = 0; r < rank; ++r) {
      format::load_halves(token + std::size_t{r} * n * sizeof(Half), n, scratch.token_scale.data());
      for (std::size_t row = 0; row < n_rows; ++row) {
        scratch.operand[row * rank + r] =
            kernels_.dot(weights + row * stride, scratch.token_scale.data(), n);
      }
    }
    multiply({channel, 16, value_dim_, rank, value_dim_}, scratch.operand.data(), rank, n_rows,
             scratch.product.data(), value_dim_, scratch);
    kernels_.axpby(out, n_rows * value_dim_, 1.0f, scratch.product.data(), 1.0f);
  }
  format::for_each_outlier(layout, block.bytes.data(), Tensor::kValue, head,
                           [&](std::uint32_t slot, std::uint32_t channel, float value) {
                             for (std::size_t row = 0; row < n_rows; ++row) {
                               out[row * value_dim_ + channel] +=
                                   weights[row * stride + slot] * value;
                             }
                           });
}

void SegmentMath::accumulate(const Segment& segment, std::uint32_t head, const float* weights,
                             std::size_t stride, std::size_t n_rows, float* out,
                             SegmentScratch& scratch) const {
  if (segment.page != nullptr) {
    page_accumulate(*segment.page, head, weights, stride, n_rows, out, scratch);
    return;
  }
  block_accumulate(*segment.block, head, weights, stride, n_rows, out, scratch);
}

void SegmentMath::block_accumulate(const SealedBlock& block, std::uint32_t head,
                                   const float* weights, std::size_t stride, std::size_t n_rows,
                                   float* out, SegmentScratch& scratch) const {
  const format::TensorFormat& format = block.layout->tensor(Tensor::kValue);
  float* sums = out;
  if (format.reordered) {
    sums = scratch.reordered.data();
    std::fill_n(sums, n_rows * value_dim_, 0.0f);
  }
  for (int cls = 0; cls < format.n_classes; ++cls) {
    value_class(block, head, cls, weights, stride, n_rows, sums, scratch);
  }
  if (format.rank > 0 || format.outliers > 0) {
    value_corrections(block, head, weights, stride, n_rows, sums, scratch);
  }
  if (format.reordered) {
    format::channel_order(*block.layout, block.bytes.data(), Tensor::kValue, head,
                          scratch.order.data());
    for (std::size_t row = 0; row < n_rows; ++row) {
      for (std::uint32_t c = 0; c < value_dim_; ++c) {
        out[row * value_dim_ + scratch.order[c]] += sums[row * value_dim_ + c];
      }
    }
  }
}

// Tokens of weight 0 do not enter, whatever their values are.
void SegmentMath::accumulate_one_by_one(const StagingPage& page, std::uint32_t head,
                                        const float* weights, std::size_t stride,
                                        std::size_t n_rows, float* out) const {
  const Half* values = page.exact_values() + std::size_t{head} * value_dim_;
  for (std::size_t row = 0; row < n_rows; ++row) {
    for (std::uint32_t slot = 0; slot < page.capacity(); ++slot) {
      const float weight = weights[row * stride + slot];
      for (std::uint32_t c = 0; weight != 0.0f && c < value_dim_; ++c) {
        out[row * value_dim_ + c] +=
            weight * half_to_float(values[std::size_t{slot} * value_row_ + c]);
      }
    }
  }
}

void SegmentMath::exact_values(const SealedBlock& block, std::uint32_t head, int cls,
                               const float* weights, std::size_t stride, std::size_t n_rows,
                               float* out, SegmentScratch& scratch) const {
  const BlockLayout& layout = *block.layout;
  const std::uint32_t n = layout.class_tokens(Tensor::kValue, cls);
  const std::uint32_t width = layout.group_channels(Tensor::kValue);
  const float* class_weights = weights + layout.first_slot(Tensor::kValue, cls);
  for (std::uint32_t group = 0; group < layout.n_groups(Tensor::kValue); ++group) {
    multiply({at(block, layout.codes(Tensor::kValue, head, cls, group)), 16, width, n, width},
             class_weights, stride, n_rows, scratch.product.data(), width, scratch);
    for (std::size_t row = 0; row < n_rows; ++row) {
      kernels_.axpby(out + row * value_dim_ + std::size_t{group} * width, width, 1.0f,
                     scratch.product.data() + row * width, 1.0f);
    }
  }
}

void SegmentMath::value_class(const SealedBlock& block, std::uint32_t head, int cls,
                              const float* weights, std::size_t stride, std::size_t n_rows,
                              float* out, SegmentScratch& scratch) const {
  const BlockLayout& layout = *block.layout;
  const format::TensorFormat& format = layout.tensor(Tensor::kValue);
  const std::uint32_t n = layout.class_tokens(Tensor::kValue, cls);
  if (n == 0) {
    return;
  }
  const int bits = format.bits[static_cast<std::size_t>(cls)];
  if (bits == format::kEvictedBits) {
    return;  // their weights are 0
  }
  if (bits == format::kExactBits) {
    exact_values(block, head, cls, weights, stride, n_rows, out, scratch);
    return;
  }
  const std::size_t inner = format::padded_inner(bits, n);
  const float* class_weights = weights + layout.first_slot(Tensor::kValue, cls);
  const bool channelwise = format.granularity == Granularity::kChannelwise;
  if (channelwise) {
    const std::byte* params = at(block, layout.channel_scale_min(Tensor::kValue, head, cls));
    format::load_halves(params, value_dim_, scratch.channel_a.data());
    format::load_halves(params + value_dim_ * sizeof(Half), value_dim_, scratch.channel_b.data());
    std::fill_n(scratch.token_scale.begin(), n, 1.0f);
    std::fill_n(scratch.token_min.begin(), n, 1.0f);  // mu = sum of weights
  } else if (format.granularity == Granularity::kChannelSeparable) {
    format::load_halves(at(block, layout.channel_factor(Tensor::kValue, head, cls)), value_dim_,
                        scratch.channel_a.data());
  } else {
    std::fill_n(scratch.channel_a.begin(), value_dim_, 1.0f);
  }

  const std::uint32_t width = layout.group_channels(Tensor::kValue);
  for (std::uint32_t group = 0; group < layout.n_groups(Tensor::kValue); ++group) {
    if (!channelwise) {
      format::load_token_params(layout, block.bytes.data(), Tensor::kValue, head, cls, group,
                                scratch.token_scale.data(), scratch.token_min.data());
    }
    for (std::size_t row = 0; row < n_rows; ++row) {
      float* x = scratch.operand.data() + row * inner;
      kernels_.multiply(x, class_weights + row * stride, scratch.token_scale.data(), n);
      std::fill(x + n, x + inner, 0.0f);
    }
    multiply({at(block, layout.codes(Tensor::kValue, head, cls, group)), bits, width, n, 0},
             scratch.operand.data(), inner, n_rows, scratch.product.data(), width, scratch);
    const std::size_t first_channel = std::size_t{group} * width;
    const float* a = scratch.channel_a.data() + first_channel;
    const float* b = scratch.channel_b.data() + first_channel;
    for (std::size_t row = 0; row < n_rows; ++row) {
      const float mu = kernels_.dot(class_weights + row * stride, scratch.token_min.data(), n);
      const float* product = scratch.product.data() + row * width;
      float* o = out + row * value_dim_ + first_channel;
      for (std::uint32_t c = 0; c < width; ++c) {
        o[c] += channelwise ? a[c] * product[c] + b[c] * mu : a[c] * (product[c] + mu);
      }
    }
  }
}

}  // namespace zipcache::cache
