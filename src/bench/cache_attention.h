// Our side: a LayerCache that was filled chunk by chunk, and one attention step over it as the
// plug-in runs it in the host's thread pool: prepare on one thread, run on all, commit on the last.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "bench/host_attention.h"
#include "bench/op_graph.h"
#include "bench/rows.h"
#include "cache/attention.h"
#include "cache/layer_cache.h"
#include "policy/policy.h"

namespace zipcache::bench {

class CacheAttention {
 public:
  // The same tokens and mask as in HostAttention.
  CacheAttention(const AttentionShape& shape, std::shared_ptr<const policy::Policy> policy,
                 const kernels::KernelTable* kernels, std::uint32_t n_kv, std::uint32_t n_query,
                 const RandomRows& rows);

  // Writes the last n_query tokens into their cells anew, so that the next run() finds them staged.
  void put_newest();
  // Attention with the policy's work: saliency and sealing. Seconds.
  double run(std::uint32_t n_threads, bool flushes_caches);
  // Time that the last run() spent in commit(): saliency and sealing.
  double commit_seconds() const { return commit_seconds_; }

  cache::ByteCount bytes() const { return cache_.bytes(); }
  std::size_t scratch_bytes() const { return attention_.scratch_bytes(); }
  const std::vector<float>& output() const { return output_; }

 private:
  void put(std::uint32_t first, std::uint32_t n);
  void fill(std::uint32_t n_tokens);
  // Rows see tokens from `first_visible` on, up to themselves.
  void show(std::uint32_t first_row, std::uint32_t n_rows, std::uint32_t first_visible);
  void prepare(std::uint32_t n_threads);
  static void call_prepare(ggml_tensor* node, int ith, int n_threads, void* self);
  static void call_run(ggml_tensor* node, int ith, int n_threads, void* self);

  const AttentionShape shape_;
  const std::uint32_t n_kv_, n_query_;
  const RandomRows rows_;
  cache::LayerCache cache_;
  cache::Attention attention_;
  cache::Visibility visible_;
  std::vector<Half> mask_;
  std::vector<float> queries_, output_;
  std::vector<float> newest_keys_, newest_values_;
  cache::Query query_;
  Status done_ = ok_status();  // the host's callbacks can't fail
  std::mutex done_mutex_;
  double commit_seconds_ = 0;
  OpGraph graph_;
};

}  // namespace zipcache::bench
