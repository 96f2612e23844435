// What the kernels take: plain structs of device pointers and sizes. No ownership, no framework.
// Shapes stand beside the pointers; strides are named where they are not the product of the dims.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_page.h"

namespace zipcache::cuda {

using HalfBits = std::uint16_t;  // fp16, kept as its bits

// Pages of one row (sequence, KV head) and class, all but the last full: what a block of threads
// streams at a time. A run of one scale set, or up to kItemPages pages of several, such that a
// warp's tiles are of one. Made by plan_decode(). Items of a block stand together in groups, so
// that a warp loads a group at once, 16 bytes per lane; places that are left over have no pages.
inline constexpr int kItemPages = 8;
inline constexpr int kItemGroup = 4;
// Most blocks have ten scale sets at 8 x 8k in blocks of 512; a second round of folds costs them
// 1.6 us.
inline constexpr int kMaxFolds = 10;
// Blocks that merge in each other's shared memory.
inline constexpr int kClusterBlocks = 4;
struct alignas(128) WorkItem {
  std::int32_t first_page = 0;  // index into DecodeParams::pages; of a run
  std::int32_t n_pages = 0;
  std::int32_t next = -1;       // the block's next item, -1 = none
  std::int32_t tile_bytes = 0;  // of its class

  std::int32_t row = 0;
  std::uint32_t bits = 0;  // item_class_bits(), kItem... flags, item_folds()
  std::int32_t n_tokens = 0;
  std::int32_t value_offset = 0;  // of its tiles

  std::uint32_t page_folds = 0;    // warp_fold()
  std::int32_t first_set = 0;      // what `folds` count sets from
  std::int32_t partial = 0;        // the block's slot of the row's
  std::int32_t first_partial = 0;  // slots: [first_partial, first_partial + n_partials)

  // 1: the block has the whole row and writes the result itself. 0: its cluster has and does, each
  // block with this one part.
  std::int32_t n_partials = 0;
  std::int32_t sequence = 0;  // of the row

  // Where the first pages are: they come with the item, in one trip to memory less.
  struct Page {
    std::uint32_t unit = 0;
  } pages[kItemPages];
  // What the query is folded for, for this item and those behind it: sets, and the tail.
  struct Fold {
    std::uint16_t set = 0;   // from first_set on
    std::uint16_t bits = 0;  // item_class_bits(), of kTailClass for the fp16 tail
  } folds[kMaxFolds];
};
inline constexpr int kFoldBits = 4;  // that number one of the last folded
inline constexpr std::uint32_t kFoldMask = (1u << kFoldBits) - 1;
static_assert(kMaxFolds <= 1 << kFoldBits && kItemPages * kFoldBits <= 32);
// Which of the last folded ones is for the tiles of an item that a warp takes from `first_tile` on:
// kFoldBits for every kTilesPerPage warps.
ZC_HOST_DEVICE constexpr int warp_fold(std::uint32_t page_folds, int first_tile) {
  return static_cast<int>(page_folds >> first_tile / kTilesPerPage * kFoldBits & kFoldMask);
}
ZC_HOST_DEVICE constexpr std::uint32_t item_class_bits(PageClass cls) {
  return static_cast<std::uint32_t>(cls.key_bits | cls.value_bits << 4 | cls.wide_chunks << 8 |
                                    cls.wide_bits << 12);
}
ZC_HOST_DEVICE constexpr PageClass item_class(std::uint32_t bits) {
  return {static_cast<std::uint8_t>(bits & 15), static_cast<std::uint8_t>(bits >> 4 & 15),
          static_cast<std::uint8_t>(bits >> 8 & 15), static_cast<std::uint8_t>(bits >> 12 & 15)};
}
inline constexpr std::uint32_t kItemEndsPart = 1u << 16;  // the block's last of this row
inline constexpr std::uint32_t kItemWithTail = 2u << 16;  // the row's fp16 tail follows
inline constexpr std::uint32_t kItemFolds = 4u << 16;     // the query is folded anew, item_folds()
inline constexpr int kItemTailFoldShift = 20;             // which of the last folded is the tail's
inline constexpr int kItemTurnShift = 24;                 // the warp that takes its first tile
inline constexpr int kItemFoldsShift = 28;                // how many are folded
ZC_HOST_DEVICE constexpr int item_folds(std::uint32_t bits) {
  return static_cast<int>(bits >> kItemFoldsShift);
}
inline constexpr PageClass kTailClass{15, 0};  // of no page
static_assert(sizeof(WorkItem) * kItemGroup == kWarpLanes * 16);

// Where a row's tail begins in DecodeParams::tail_k and tail_v.
ZC_HOST_DEVICE constexpr std::int64_t tail_offset(int row, int head_dim) {
  return std::int64_t{row} * kTailTokens * head_dim;
}

// What a decode step stores on its way, of the token whose query attends: its key and value as the
// last of its sequence's tail; with a ring, the query as a probe of the next sealing, and the lse
// of the step before.
struct DecodeStore {
  const float* k = nullptr;  // [n_sequences, n_kv_heads, head_dim], strides in floats between
  const float* v = nullptr;  // sequences; nullptr: nothing is stored, the tails are complete
  std::int64_t k_stride = 0;
  std::int64_t v_stride = 0;
  HalfBits* ring_q = nullptr;             // [n_sequences, ring, n_heads, head_dim], or nullptr
  float* ring_lse = nullptr;              // [n_sequences, ring, n_heads], from DecodeParams::lse
  const std::int32_t* ring_at = nullptr;  // [n_sequences, 2]: slot of this query, of that lse;
                                          // < 0: none
  std::int32_t ring = 0;
};

// Attention of one query token per sequence. Row r = sequence * n_kv_heads + kv_head.
struct DecodeParams {
  std::int32_t n_sequences = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t n_heads = 0;  // query heads; group = n_heads / n_kv_heads, 1..8
  std::int32_t head_dim = 0;
  float scale = 0;  // of q . k, usually 1 / sqrt(head_dim)

  const float* q = nullptr;  // [n_sequences, n_heads, head_dim], 16-byte aligned; taken as fp16
  float* out = nullptr;      // [n_sequences, n_heads, head_dim]
  float* lse = nullptr;      // [n_sequences, n_heads], base 2; may be nullptr

  const std::uint8_t* pool = nullptr;  // 128-byte aligned
  const PageEntry* pages = nullptr;    // [all pages of all rows]
  const HalfBits* key_sets = nullptr;  // [sets, 2, head_dim]: scale, min of stored channels
  // [sets, head_dim]: the channel of each stored one, of sets whose pages have wide channels
  // (others are not read); nullptr: no pages have.
  const std::uint8_t* key_orders = nullptr;
  const float* value_factors = nullptr;  // [rows, head_dim]

  HalfBits* tail_k = nullptr;                 // [rows, kTailTokens, head_dim]; may be nullptr
  HalfBits* tail_v = nullptr;                 // same shape
  const std::int32_t* tail_tokens = nullptr;  // [n_sequences], 0..kTailTokens
  DecodeStore store;                          // counted in tail_tokens already

  const WorkItem* items = nullptr;  // block b starts at item b * kItemGroup
  std::int32_t n_blocks = 0;
  std::int32_t cluster_blocks = 1;  // kClusterBlocks, if clusters have whole rows
  // The launch may start before the kernel ahead of it in the stream ends (on sm_90), if that one
  // wrote neither pages nor items. Queries, tails and the workspace are touched after it has ended.
  bool start_early = false;
  float* partials = nullptr;         // [n_partials, group, head_dim + 2]
  std::uint32_t* tickets = nullptr;  // [rows], zero; left zero
};

// Attention of any number of query tokens over one sequence store (a layer of one stream): sealed
// pages and fp16 rows, with a mask. The general case: prefill of a chunk after a sealed past,
// several sequences in one store, sliding windows, overwritten cells. Row = KV head.
//
//   weight of token t for query n, head h:  x = scale * q . k;  x = softcap * tanh(x / softcap), if
//   softcap > 0;  x += slope[h] * mask[n, cell of t].  A token is not seen when its mask is -inf,
//   or its cell is < 0. A sink joins maximum and sum without a value. No token seen: zeros, lse
//   -inf (or the sink's).
struct PrefillParams {
  std::int32_t n_queries = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t n_heads = 0;  // query heads; group = n_heads / n_kv_heads, 1..8
  std::int32_t head_dim = 0;
  float scale = 0;
  float softcap = 0;  // 0: none

  const float* q = nullptr;  // [n_queries, n_heads, head_dim], strides in floats; 16-byte aligned
  std::int64_t q_query_stride = 0;
  std::int64_t q_head_stride = 0;
  float* out = nullptr;  // [n_queries, n_heads, head_dim]
  float* lse = nullptr;  // [n_queries, n_heads], base 2, the sink included; may be nullptr

  const HalfBits* mask = nullptr;  // [n_queries, mask_stride >= cells]; nullptr: all live tokens
  std::int64_t mask_stride = 0;
  const float* slopes = nullptr;  // [n_heads], > 0; nullptr: 1
  const float* sinks = nullptr;   // [n_heads], in the units of x; nullptr: none

  // Sealed tokens: pages [row_begin[r], row_begin[r + 1]) of row r. No pages: row_begin nullptr.
  const std::uint8_t* pool = nullptr;  // 128-byte aligned
  PageClass classes[kMaxClasses];
  const PageEntry* pages = nullptr;          // of all rows, row after row
  const std::int32_t* page_cells = nullptr;  // [pages, kPageTokens]: the slot's cell, < 0: dead
  const std::int32_t* row_begin = nullptr;   // [n_kv_heads + 1]
  const std::int32_t* set_base = nullptr;    // [n_kv_heads]: first scale set of the row
  const HalfBits* key_sets = nullptr;        // [sets, 2, head_dim]: scale, min of stored channels
  const std::uint8_t* key_orders = nullptr;  // as in DecodeParams
  const float* value_factors = nullptr;      // [n_kv_heads, head_dim]

  // fp16 tokens, sealed never or not yet; element (token, head, channel) at token *
  // dense_token_stride + head * dense_head_stride + channel; 16-byte aligned. Values must be
  // finite.
  std::int32_t n_dense = 0;
  const HalfBits* dense_k = nullptr;
  const HalfBits* dense_v = nullptr;
  std::int64_t dense_token_stride = 0;
  std::int64_t dense_head_stride = 0;
  const std::int32_t* dense_cells = nullptr;  // [n_dense], < 0: dead; nullptr: token = cell

  // Blocks of threads that share the keys of a query tile and head: prefill_splits().
  std::int32_t n_splits = 1;
  float* partials = nullptr;         // prefill_partial_floats() floats; n_splits 1: nullptr
  std::uint32_t* tickets = nullptr;  // prefill_tickets() words, zero; left zero
};

inline constexpr int kMaxKeySets = 4;
// Layers that one launch serves: problems of one shape, each with pointers of its own.
inline constexpr int kMaxBatch = 8;

// Quantizes tokens of one sequence into pages. Slots are tokens in class order: first those of page
// class 0, and so on; every head has the same counts. Pages of a class start on a fresh page.
struct PackParams {
  std::int32_t n_tokens = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t head_dim = 0;
  const HalfBits* k = nullptr;          // [n_tokens, n_kv_heads, head_dim], token_stride between
  const HalfBits* v = nullptr;          // same shape
  std::int64_t token_stride = 0;        // halves between tokens
  const std::int32_t* order = nullptr;  // [n_kv_heads, n_tokens]: slot -> token; nullptr: identity

  std::int32_t n_classes = 0;  // page classes, most salient first
  PageClass classes[kMaxClasses];
  std::int32_t class_tokens[kMaxClasses] = {};
  std::int32_t key_set[kMaxClasses] = {};  // class -> scale set of the row (0..n_key_sets-1)
  std::int32_t n_key_sets = 0;             // <= kMaxKeySets
  float key_clip[kMaxClasses] = {};        // per class: its range shrunk to this fraction
  float value_clip[kMaxClasses] = {};
  float wide_clip = 1;  // of wide channels, in every class
  // Stretches the scale of a value token so that its decoded vector has the length of the exact one
  // along it.
  bool keep_length = false;
  // [n_kv_heads, head_dim]: the wide channels of a head, if the classes have some, are those with
  // the largest range^2 * query_power, of all its tokens, the lower channel first among equals.
  // nullptr:
  // 1. See query_power().
  const float* query_power = nullptr;
  bool keep_factors = false;  // value_factors are given (a later segment), not computed

  std::uint8_t* pool = nullptr;
  const PageEntry* pages = nullptr;    // [n_kv_heads, n_pages], n_pages as pack_pages() counts
  HalfBits* key_sets = nullptr;        // [n_kv_heads, n_key_sets, 2, head_dim]
  std::uint8_t* key_orders = nullptr;  // [n_kv_heads, n_key_sets, head_dim]; as in DecodeParams
  float* value_factors = nullptr;      // [n_kv_heads, head_dim]
  std::uint32_t* workspace = nullptr;  // pack_workspace_words() words, zero; left zero
};

// Column sums of the attention weights of probe rows (paper section 4.3): for every KV head and
// token the mean weight over its query heads and over the probes that see the token.
struct ProbeParams {
  std::int32_t n_tokens = 0;
  std::int32_t n_probes = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t n_heads = 0;
  std::int32_t head_dim = 0;
  float scale = 0;
  const HalfBits* q = nullptr;  // [n_probes, n_heads, head_dim]
  const HalfBits* k = nullptr;  // [n_tokens, n_kv_heads, head_dim], token_stride between
  std::int64_t token_stride = 0;
  const float* lse = nullptr;               // [n_probes, n_heads], base 2
  const std::int32_t* positions = nullptr;  // [n_probes], ascending: a probe sees tokens <= it
  float* saliency = nullptr;                // [n_kv_heads, n_tokens]
};

// Sum of q^2 over query rows, for each channel of each KV head's query heads: which channels of
// keys the queries read.
struct QueryPowerParams {
  std::int32_t n_queries = 0;
  std::int32_t n_kv_heads = 0;
  std::int32_t n_heads = 0;
  std::int32_t head_dim = 0;
  const HalfBits* q = nullptr;  // [n_queries, n_heads, head_dim]
  bool add = false;             // to what is there
  float* power = nullptr;       // [n_kv_heads, head_dim]
};

}  // namespace zipcache::cuda
