// What a device cache does around attention: what a mask shows, new tokens into fp16 rows, rows
// between the tail and the window of a step, ranks, the cells of a launch's pages. The window is
// all tokens of a sequence that are not sealed, in one step's scratch memory, [token, KV head,
// channel].
//
// As in cuda_kernels.h: device pointers stay the caller's, all work goes to the caller's stream.
#pragma once

#include <cstdint>

#include "base/expected.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/params.h"

namespace zipcache::cuda {

// Of every cell: whether any and whether all query rows see it; of every row: how many it sees.
inline constexpr std::uint8_t kSeenByAny = 1, kSeenByAll = 2;
struct MaskSummaryParams {
  std::int32_t n_planes = 0;  // one mask per sequence
  std::int32_t n_rows = 0;
  std::int32_t n_cells = 0;
  const HalfBits* mask = nullptr;  // [n_planes, n_rows, n_cells], strides in halves; -inf hides
  std::int64_t plane_stride = 0;
  std::int64_t row_stride = 0;
  std::uint8_t* flags = nullptr;       // [n_planes, n_cells]
  std::int32_t* row_counts = nullptr;  // [n_planes, n_rows], zero before
};
Status summarize_mask(const MaskSummaryParams& params, Stream stream);

// Where fp16 rows of a sequence are: element (token, KV head, channel) at
// token * token_stride + head * head_stride + channel, in halves.
struct RowsAt {
  HalfBits* k = nullptr;
  HalfBits* v = nullptr;
  std::int64_t sequence_stride = 0;
  std::int64_t token_stride = 0;
  std::int64_t head_stride = 0;
};

// New keys and values of n_sequences x n_per_sequence tokens as fp16 rows.
struct IngestParams {
  std::int32_t n_sequences = 0;
  std::int32_t n_per_sequence = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  const float* k = nullptr;  // [tokens, n_kv_heads, head_dim], strides in floats between tokens
  const float* v = nullptr;
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
  RowsAt to;
  const std::int32_t* place = nullptr;  // [tokens]: token of its sequence in `to`
};
Status ingest(const IngestParams& params, Stream stream);

// Copies tokens from[i] to to[i] of one sequence.
struct MoveParams {
  std::int32_t n_tokens = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  RowsAt source, target;
  const std::int32_t* from = nullptr;
  const std::int32_t* to = nullptr;
};
// A batch: see pack().
Status move_rows(std::span<const MoveParams> batch, Stream stream);
inline Status move_rows(const MoveParams& params, Stream stream) {
  return move_rows({&params, 1}, stream);
}

// Query rows of a step as the probes of probe_saliency().
struct GatherProbesParams {
  std::int32_t n_probes = 0;
  std::int32_t n_heads = 0;
  std::int32_t head_dim = 0;
  const std::int32_t* rows = nullptr;  // [n_probes]
  const float* q = nullptr;
  std::int64_t q_query_stride = 0;
  std::int64_t q_head_stride = 0;
  const float* lse = nullptr;   // [rows, n_heads]
  HalfBits* probe_q = nullptr;  // [n_probes, n_heads, head_dim]
  float* probe_lse = nullptr;   // [n_probes, n_heads]
};
Status gather_probes(const GatherProbesParams& params, Stream stream);

// Tokens by descending saliency, of equal ones the newer first, NaN last.
struct RankParams {
  std::int32_t n_tokens = 0;
  std::int32_t n_kv_heads = 0;
  const float* saliency = nullptr;  // [n_kv_heads, head_stride]
  std::int64_t head_stride = 0;
  std::int32_t* order = nullptr;  // [n_kv_heads, n_tokens]: slot -> token, as PackParams takes it
  std::uint16_t* kept = nullptr;  // the same, [n_kv_heads, kept_stride]
  std::int64_t kept_stride = 0;
};
inline constexpr int kMaxRankTokens = 4096;
Status rank_tokens(std::span<const RankParams> batch, Stream stream);
inline Status rank_tokens(const RankParams& params, Stream stream) {
  return rank_tokens({&params, 1}, stream);
}

// A page of a launch's list: where its ranks and the cells of its block are.
struct PageSource {
  std::uint32_t ranks = 0;  // index of its slot 0 in `kept`
  std::uint32_t cells = 0;  // index of its block's token 0 in `block_cells`
  std::uint32_t tokens = 0;
};
struct PageCellsParams {
  std::int32_t n_pages = 0;
  const PageSource* pages = nullptr;
  const std::uint16_t* kept = nullptr;
  const std::int32_t* block_cells = nullptr;  // < 0: dead
  std::int32_t* page_cells = nullptr;         // PrefillParams::page_cells
};
Status list_page_cells(const PageCellsParams& params, Stream stream);

}  // namespace zipcache::cuda
