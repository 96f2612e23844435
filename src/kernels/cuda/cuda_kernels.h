// The CUDA kernels, checked: shapes that no kernel supports are an error of one line that says what
// is required, what is supported and what is missing. Nothing here waits for the device; all work
// goes to the caller's stream and may be captured into a graph.
//
// Pointers in the parameter structs are device memory of the current device and stay the caller's.
#pragma once

#include <cstddef>
#include <span>

#include "base/expected.h"
#include "kernels/cuda/decode_config.h"
#include "kernels/cuda/params.h"

struct CUstream_st;

namespace zipcache::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// --- Decode attention ----------------------------------------------------------------------------

// What a shape and its classes need; computed once, good for any number of launches.
struct DecodeSetup {
  DecodeSharedPlan shared;
  // As many as the device runs at once: PlanInput's.
  int resident_blocks = 0;
  int resident_clusters = 0;  // of kClusterBlocks; 0: rows are none
};
Expected<DecodeSetup> prepare_decode(int head_dim, int group, std::span<const PageClass> classes);

// REQUIRES: `setup` from prepare_decode() with the params' head_dim, group and classes; tickets are
// zero; key-value pointers 16-byte aligned.
Status decode(const DecodeParams& params, const DecodeSetup& setup, Stream stream);

// --- Prefill attention ---------------------------------------------------------------------------

// How many blocks of it the device runs at once; call once per device and head_dim before
// prefill().
Expected<int> prefill_resident_blocks(int head_dim);
// Into how many parts to cut the keys of every query tile and head, so that all these blocks have
// work. `n_tokens`: of a row, about.
int prefill_splits(const PrefillParams& params, int n_tokens, int resident_blocks);
// Sizes of the workspace of a launch; none is needed with one split.
std::size_t prefill_partial_floats(const PrefillParams& params);
std::size_t prefill_tickets(const PrefillParams& params);

// Also the way for what decode() does not take: masks, soft caps, sinks (n_queries = 1).
Status prefill(const PrefillParams& params, Stream stream);

// --- Quantize and pack ---------------------------------------------------------------------------

// Pages of one head: a class begins on a fresh page.
int pack_pages(const PackParams& params);
// Words of PackParams::workspace.
constexpr std::size_t pack_workspace_words(const PackParams& p) {
  return static_cast<std::size_t>(p.n_kv_heads) * p.head_dim * (2 * p.n_key_sets + 1);
}
// REQUIRES of this and the functions below that take a batch: at most kMaxBatch problems, all sizes
// the same.
Status pack(std::span<const PackParams> batch, Stream stream);
inline Status pack(const PackParams& params, Stream stream) { return pack({&params, 1}, stream); }

// --- Saliency ------------------------------------------------------------------------------------

Status probe_saliency(std::span<const ProbeParams> batch, Stream stream);
inline Status probe_saliency(const ProbeParams& params, Stream stream) {
  return probe_saliency({&params, 1}, stream);
}
Status query_power(std::span<const QueryPowerParams> batch, Stream stream);
inline Status query_power(const QueryPowerParams& params, Stream stream) {
  return query_power({&params, 1}, stream);
}

}  // namespace zipcache::cuda
