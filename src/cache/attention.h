// One attention step over a LayerCache: softmax(scale * q k^T + mask) v for a chunk of query rows,
// computed on codes, and afterwards the policy's work: saliency of the staged tokens and sealing.
//
//   prepare()  one thread    plans the work; new tokens of the step must have been put()
//   run()      all threads   ith = 0 .. n_threads-1; returns when no work is left
//   commit()   one thread    after every run() returned: saliency, sealing
//
// The result of a query row does not depend on the number of threads or on other rows' content.
// An Attention may serve many caches one after another; it only owns scratch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned.h"
#include "base/expected.h"
#include "cache/layer_cache.h"
#include "cache/visibility.h"
#include "kernels/kernels.h"

namespace zipcache::cache {

struct Query {
  // q: [n_rows, n_heads, key_dim] float, strides in floats; rotary embedding applied.
  const float* q = nullptr;
  std::size_t q_row_stride = 0;
  std::size_t q_head_stride = 0;
  // out: [n_rows, n_heads, value_dim] float.
  float* out = nullptr;
  std::size_t out_row_stride = 0;
  std::size_t out_head_stride = 0;

  std::uint32_t n_rows = 0;
  std::uint32_t n_heads = 0;  // a multiple of n_kv_heads; head h reads KV head h / (H / HK)
  const Visibility* visible = nullptr;
  std::uint32_t first_row = 0;  // row 0 here is this row of `visible`

  float scale = 1.0f;
  float softcap = 0.0f;           // > 0: x = softcap * tanh(x / softcap)
  const float* slopes = nullptr;  // [n_heads] factors of the mask's bias (ALiBi), nullptr = 1
  const float* sinks = nullptr;   // [n_heads] one extra logit per head, nullptr = none

  // Row i is the token in cell newest_cells()[i]: rows may act as probes and tokens be sealed.
  // False when the rows' own tokens are not in this cache.
  bool rows_are_newest = true;
};

class Attention {
 public:
  explicit Attention(const kernels::KernelTable* kernels);
  ~Attention();

  // REQUIRES: set_heads() was called; `cache`, query memory and `query.visible` stay valid until
  // commit() returns. kUnsupported / kOutOfMemory leave nothing to run.
  Status prepare(LayerCache& cache, const Query& query, std::uint32_t n_threads);
  // A share of the attention; calls for ith = 0..n_threads-1, in any order or at once.
  void run(std::uint32_t ith);
  // The policy's work, once all run() returned: saliency and sealing.
  Status commit();
  // Both, called by n_threads threads at once: who finishes run() last commits, with the help of
  // the others, and returns what commit() does.
  Status run_together(std::uint32_t ith);

  // Memory that it keeps for the next step.
  std::size_t scratch_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace zipcache::cache
