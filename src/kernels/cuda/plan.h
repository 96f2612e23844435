// How decode attention is cut among blocks of threads that all run at once: rows' pages weighted by
// their cost, cut at page borders, either as equal pieces of the line of all rows or, where that
// leaves no block more to do, with rows in equal pieces or whole (a part of a row costs a start and
// a merge). Rows of four blocks are clusters where the device has them. A block's piece becomes
// items of one row and class each. Pure host code; a plan holds until a page list changes (the
// length of the fp16 tails is read by the kernel).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/params.h"

namespace zipcache::cuda {

// PlanInput::min_block_bytes where runs of a scale set are short: each costs a block the time of a
// few tiles, so there are as many blocks as there is any work for (4k tokens of one sequence, 32
// layers: 3.58 ms a step with 72 blocks, 3.46 ms with 264).
inline constexpr int kShortRunsBlockBytes = 16 << 10;

struct PlanInput {
  int head_dim = 0;
  int group = 1;       // query heads per KV head
  int n_kv_heads = 0;  // > 0; rows of a sequence
  std::span<const PageClass> classes;
  std::span<const PageEntry> pages;         // of all rows, row after row
  std::span<const std::int32_t> row_begin;  // rows + 1: first page of each row
  std::span<const std::int32_t> set_base;   // rows: first scale set of each row
  bool with_tail = true;
  int tail_tokens = kTailTokens / 2;  // what to expect, on average
  // A tail behind a row's pages costs this much more than its bytes: its fold, and loads that
  // follow each other (8 x 8k in blocks of 512 and tails of 40: 23.9 us without, 23.5 with it).
  int tail_bytes = 48 << 10;
  int resident_blocks = 0;    // > 0; blocks that run at once
  int resident_clusters = 0;  // of kClusterBlocks; 0: none
  // A tile costs this much more than its bytes: narrow codes wait for arithmetic.
  int tile_bytes = 1536;
  // A block's part of a row costs this much however little it reads: start, merge, partial result.
  int part_bytes = 48 << 10;
  int min_block_bytes = 80 << 10;  // of cost; below this, more blocks are no faster
  // At least so many blocks, those without work included: plans with the same number need the same
  // launch, which can be repeated.
  int n_blocks = 0;
};

struct DecodePlan {
  std::vector<WorkItem> items;  // DecodeParams::items
  int n_blocks = 0;
  int cluster_blocks = 1;  // kClusterBlocks: the launch has clusters
  int n_partials = 0;      // slots of DecodeParams::partials
};

// REQUIRES: at least one row; row_begin and set_base of their sizes; classes of all pages exist.
DecodePlan plan_decode(const PlanInput& input);

}  // namespace zipcache::cuda
