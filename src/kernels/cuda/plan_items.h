// A block's part of a row as work items: in which order its pages are read, and when the query is
// folded for which scale sets. Pure host code.
#pragma once

#include <span>
#include <vector>

#include "kernels/cuda/plan.h"

namespace zipcache::cuda {

// Items of pages `pages` (indices into PlanInput::pages, ascending) of a row, and of its tail if
// `with_tail`. They stand class by class, the last class first if `reversed`. At least one item,
// the last with kItemEndsPart; partial results, `next` and turns are left to the caller.
std::vector<WorkItem> items_of_part(const PlanInput& input, int row, std::span<const int> pages,
                                    bool with_tail, bool reversed);

}  // namespace zipcache::cuda
