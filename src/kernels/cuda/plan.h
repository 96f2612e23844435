// How decode attention is cut among blocks of threads: all rows' pages in one line, weighted by
// their bytes, cut into equal pieces at page borders. Pure host code; a plan holds until a page
// list changes (the length of the fp16 tails is read by the kernel).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/params.h"

namespace zipcache::cuda {

struct PlanInput {
  int head_dim = 0;
  std::span<const PageClass> classes;
  std::span<const PageEntry> pages;         // of all rows, row after row
  std::span<const std::int32_t> row_begin;  // rows + 1: first page of each row
  bool with_tail = true;
  int tail_tokens = kTailTokens / 2;  // what to expect, on average
  int max_blocks = 0;                 // > 0
  // A block costs this much however little it reads: start, merge, one more partial result.
  int item_bytes = 8 << 10;
  int min_block_bytes = 24 << 10;  // below this, more blocks are no faster
};

struct DecodePlan {
  std::vector<WorkItem> items;  // DecodeParams::items
  int n_blocks = 0;
  int n_partials = 0;  // slots of DecodeParams::partials
};

// REQUIRES: row_begin has at least one row; classes of all pages exist.
DecodePlan plan_decode(const PlanInput& input);

}  // namespace zipcache::cuda
