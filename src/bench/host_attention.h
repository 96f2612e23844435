// The peer: ggml_flash_attn_ext over K and V as llama.cpp's cache lays them out (a row holds all
// heads of a token), in one of llama.cpp's cache types.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/expected.h"
#include "bench/op_graph.h"
#include "bench/rows.h"

namespace zipcache::bench {

// llama.cpp's name of a cache type: f16, q8_0 or q4_0.
Expected<ggml_type> cache_type(const std::string& name);

struct AttentionShape {
  std::uint32_t n_heads = 0;
  std::uint32_t n_kv_heads = 0;
  std::uint32_t head_dim = 0;

  std::uint32_t kv_width() const { return n_kv_heads * head_dim; }
  std::uint32_t q_width() const { return n_heads * head_dim; }
};

class HostAttention {
 public:
  // The last `n_query` of `n_kv` tokens attend to all up to themselves.
  HostAttention(const AttentionShape& shape, ggml_type type, std::uint32_t n_kv,
                std::uint32_t n_query, const RandomRows& rows);

  // Seconds.
  double run(std::uint32_t n_threads, bool flushes_caches) {
    return graph_.compute(n_threads, flushes_caches);
  }
  std::size_t kv_bytes() const { return ggml_nbytes(keys_) + ggml_nbytes(values_); }
  const float* output() const { return static_cast<const float*>(output_->data); }

 private:
  void fill(ggml_tensor* tensor, RandomRows::Kind kind, const RandomRows& rows) const;

  OpGraph graph_;
  ggml_tensor* keys_ = nullptr;    // [n_kv_heads * head_dim, n_kv]
  ggml_tensor* values_ = nullptr;  // the same
  ggml_tensor* output_ = nullptr;  // [head_dim, n_heads, n_query]
};

}  // namespace zipcache::bench
