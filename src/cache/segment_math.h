// One segment (page or block) of one KV head in attention: logits of query rows against its keys,
// and the sum of its values weighted by probabilities. The algebra keeps the inner loops on codes
// (docs/architecture.md, "Algebra"): a channelwise scale folds into the query, a token's scale into
// its probability, and minima become one constant or one weighted sum.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "cache/layer_cache.h"
#include "kernels/kernels.h"

namespace zipcache::cache {

// Buffers of one thread; sized once per step by the largest segment and tile.
struct SegmentScratch {
  AlignedVector<float> operand;      // [rows, max padded inner]: folded queries or probabilities
  AlignedVector<float> product;      // [rows, max lanes padded]
  AlignedVector<float> token_scale;  // [max tokens of a segment]
  AlignedVector<float> token_min;    // [max tokens of a segment]
  AlignedVector<float> channel_a;    // [head_dim]
  AlignedVector<float> channel_b;    // [head_dim]
  AlignedVector<float> reordered;    // [rows, head_dim]: queries or sums in stored channel order
  std::vector<std::uint16_t> order;  // [head_dim]
  AlignedVector<Half> page;          // [head_dim, kPageTokens]: a head's rows of a packed page
  AlignedVector<std::byte> kernel;   // kernels::Scratch

  void resize(std::size_t n_rows, std::size_t max_tokens, std::size_t max_dim);
};

// What a tile of query rows needs of the cache: dims and the kernels.
class SegmentMath {
 public:
  SegmentMath(const kernels::KernelTable& kernels, const LayerCache& cache)
      : kernels_(kernels),
        value_row_(cache.shape().value_row),
        key_dim_(cache.key_dim()),
        value_dim_(cache.value_dim()) {}

  // Tokens (page: slots, free ones included) of a segment.
  static std::uint32_t n_tokens(const Segment& segment) {
    return segment.page != nullptr ? segment.page->capacity() : segment.block->n_tokens();
  }

  // logits[r * stride + slot] = q[r] . key[slot], slots in slot order of the head (page: page
  // slots). q: [n_rows, key_dim]. Room for 16 more floats behind the slots of each row is used.
  void logits(const Segment& segment, std::uint32_t head, const float* q, std::size_t n_rows,
              float* logits, std::size_t stride, SegmentScratch& scratch) const;

  // out[r * value_dim + c] += sum over slots of weights[r * stride + slot] * value[slot][c].
  void accumulate(const Segment& segment, std::uint32_t head, const float* weights,
                  std::size_t stride, std::size_t n_rows, float* out,
                  SegmentScratch& scratch) const;

 private:
  void page_logits(const StagingPage& page, std::uint32_t head, const float* q, std::size_t n_rows,
                   float* logits, std::size_t stride, SegmentScratch& scratch) const;
  void page_accumulate(const StagingPage& page, std::uint32_t head, const float* weights,
                       std::size_t stride, std::size_t n_rows, float* out,
                       SegmentScratch& scratch) const;
  void block_logits(const SealedBlock& block, std::uint32_t head, const float* q,
                    std::size_t n_rows, float* logits, std::size_t stride,
                    SegmentScratch& scratch) const;
  void block_accumulate(const SealedBlock& block, std::uint32_t head, const float* weights,
                        std::size_t stride, std::size_t n_rows, float* out,
                        SegmentScratch& scratch) const;
  void key_class(const SealedBlock& block, std::uint32_t head, int cls, const float* q,
                 std::size_t n_rows, float* logits, std::size_t stride,
                 SegmentScratch& scratch) const;
  void key_channels(const SealedBlock& block, std::uint32_t head, int cls, std::uint32_t set,
                    const float* q, std::size_t n_rows, float* logits, std::size_t stride,
                    SegmentScratch& scratch) const;
  void exact_values(const SealedBlock& block, std::uint32_t head, int cls, const float* weights,
                    std::size_t stride, std::size_t n_rows, float* out,
                    SegmentScratch& scratch) const;
  void key_corrections(const SealedBlock& block, std::uint32_t head, const float* q,
                       std::size_t n_rows, float* logits, std::size_t stride,
                       SegmentScratch& scratch) const;
  void value_corrections(const SealedBlock& block, std::uint32_t head, const float* weights,
                         std::size_t stride, std::size_t n_rows, float* out,
                         SegmentScratch& scratch) const;
  void value_class(const SealedBlock& block, std::uint32_t head, int cls, const float* weights,
                   std::size_t stride, std::size_t n_rows, float* out,
                   SegmentScratch& scratch) const;
  void accumulate_one_by_one(const StagingPage& page, std::uint32_t head, const float* weights,
                             std::size_t stride, std::size_t n_rows, float* out) const;
  void multiply(const kernels::MatrixView& matrix, const float* x, std::size_t x_stride,
                std::size_t n_rows, float* y, std::size_t y_stride, SegmentScratch& scratch) const;

  const kernels::KernelTable& kernels_;
  std::uint32_t value_row_, key_dim_, value_dim_;
};

}  // namespace zipcache::cache
