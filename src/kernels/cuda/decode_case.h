// One case of decode attention: a random cache in device pages, its meaning in floats, and the
// launch. Shared by the tests of decode, of packing and of the tail.
#pragma once

#include <set>
#include <vector>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/device_test_util.h"
#include "kernels/cuda/plan.h"

namespace zipcache::cuda {

struct DecodeCase {
  int head_dim = 128;
  int n_kv_heads = 2;
  int group = 4;
  std::vector<PageClass> classes{{4, 4}, {2, 2}};
  std::vector<std::vector<int>> class_tokens;  // [sequence][class]
  std::vector<int> tail;                       // [sequence]; empty: no tail
  int n_segments = 1;       // each class is cut into so many, with scale sets of their own
  int resident_blocks = 0;  // 0: what the device holds
  // The launch stores each tail's last token itself, and the queries and lse of even sequences as
  // probes. Every sequence has a tail.
  bool stores = false;
  std::uint64_t seed = 1;

  int n_sequences() const { return static_cast<int>(class_tokens.size()); }
  int n_heads() const { return n_kv_heads * group; }
  int n_rows() const { return n_sequences() * n_kv_heads; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

// How many chunks of wide channels are worth a case: one, half of all, all but one.
inline std::set<int> wide_chunk_counts(int head_dim) {
  const int n_chunks = head_dim / kChunkChannels;
  return {1, n_chunks / 2, n_chunks - 1};
}

// A row's tokens as floats: [tokens][head_dim].
struct DecodedRow {
  std::vector<float> k, v;
};

struct HostCache {
  std::vector<Half> q;  // [n_sequences, n_heads, head_dim]
  std::vector<std::byte> pool;
  std::vector<PageEntry> pages;
  std::vector<std::int32_t> row_begin{0};
  std::vector<Half> key_sets;
  std::vector<std::uint8_t> key_orders;
  std::vector<std::int32_t> set_base;
  std::vector<float> value_factors;
  std::vector<Half> tail_k, tail_v;
  std::vector<std::int32_t> tail_tokens;
};

HostCache make_cache(const DecodeCase& c);

// What the pages of all rows mean, tail included: read back through device_page.h.
std::vector<DecodedRow> decode_rows(const DecodeCase& c, const HostCache& cache);

struct Outputs {
  std::vector<float> out;  // [n_sequences, n_heads, head_dim]
  std::vector<float> lse;  // [n_sequences, n_heads]
  int cluster_blocks = 1;  // of the launch
};

// Launches `repeats` times (same bits expected: the caller compares) and returns each result. Fails
// the test when a guard band or a ticket was touched, or what was stored is not what was given.
std::vector<Outputs> run_decode(const DecodeCase& c, const HostCache& cache, int repeats = 1);

// Compares with the formula in double, by the error of the usual fp16 path (keys, values and
// weights rounded to fp16, sums exact) on the same data.
void expect_attention(const DecodeCase& c, const HostCache& cache, const Outputs& got);

}  // namespace zipcache::cuda
