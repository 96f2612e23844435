// Staging pages: their sizes, packing what waits, and keeping them dense.
#include <algorithm>
#include <new>

#include "cache/errors.h"
#include "cache/layer_cache.h"

namespace zipcache::cache {
namespace {

// A step of more tokens is a chunk of a prompt: what it leaves is trimmed to size. One of
// generation leaves room for the next, which then allocates nothing.
constexpr std::uint32_t kMostGenerated = 8;

}  // namespace

StagingPage::Shape LayerCache::page_shape(std::uint32_t capacity, bool packed) const {
  return {.capacity = capacity,
          .packed = packed,
          .key_row = shape_.key_row,
          .value_row = shape_.value_row,
          .n_kv_heads = n_kv_heads_,
          .has_tokens = policy_->seals(),
          .has_squares = policy_->seals() && policy_->metric == saliency::Metric::kRoco};
}

// Capacity of a packed page for so many tokens and little more: a long cache can afford to grow in
// larger steps than a short one.
std::uint32_t LayerCache::fitting(std::uint32_t n_tokens) const {
  if (newest_cells_.size() > kMostGenerated) {
    return std::min(n_tokens, kPageTokens);
  }
  const std::uint32_t step = std::clamp(static_cast<std::uint32_t>(n_live_) / 256, 1u, kPageTokens);
  return std::min(static_cast<std::uint32_t>(round_up(n_tokens, step)), kPageTokens);
}

Expected<std::uint32_t> LayerCache::make_page(std::uint32_t capacity, bool packed) {
  const StagingPage::Shape shape = page_shape(capacity, packed);
  auto page = std::make_unique<StagingPage>(shape);
  Expected<std::uint32_t> id = new_segment();
  if (!id) {
    return id.error();
  }
  if (!budget_->reserve(shape.bytes())) {
    return over_budget(*budget_, shape.bytes());
  }
  segments_[*id].page = std::move(page);
  return *id;
}

Status LayerCache::resize_page(std::uint32_t id, std::uint32_t capacity) {
  std::unique_ptr<StagingPage>& page = segments_[id].page;
  StagingPage::Shape shape = page->shape;
  shape.capacity = capacity;
  const bool grows = capacity >= page->capacity();
  auto resized = grows ? std::make_unique<StagingPage>(page->grown(capacity))
                       : std::make_unique<StagingPage>(shape);
  if (!budget_->reserve(shape.bytes())) {
    return over_budget(*budget_, shape.bytes());
  }
  for (std::uint32_t slot = 0; !grows && slot < page->capacity(); ++slot) {
    if (page->cells[slot] != kNoCell) {
      page->move_to(*resized, slot, moved_row_);
    }
  }
  budget_->release(page->bytes());
  page = std::move(resized);
  return ok_status();
}

void LayerCache::move_token(std::uint32_t from_page, std::uint32_t slot, std::uint32_t to_page) {
  StagingPage& to = *segments_[to_page].page;
  const std::uint32_t target = segments_[from_page].page->move_to(to, slot, moved_row_);
  set_owner(to.cells[target], static_cast<std::uint16_t>(to_page));
}

Expected<std::uint32_t> LayerCache::packed_page_with_room(std::uint32_t n_tokens) {
  std::uint32_t growing = UINT32_MAX;
  for (std::uint32_t id = 0; id < segments_.size(); ++id) {
    const StagingPage* page = segments_[id].page.get();
    if (page == nullptr || !page->shape.packed) {
      continue;
    }
    if (!page->is_full()) {
      return id;
    }
    growing = page->capacity() < kPageTokens ? id : growing;
  }
  if (growing == UINT32_MAX) {
    return make_page(fitting(n_tokens), /*packed=*/true);
  }
  if (Status grown = resize_page(growing, fitting(segments_[growing].page->used + n_tokens));
      !grown) {
    return grown.error();
  }
  return growing;
}

// All that the step leaves exact, so that what becomes of a token does not depend on others. The
// page of a step of generation stays for the next one where that costs little.
Status LayerCache::pack_staged() {
  std::uint32_t n_waiting = 0;
  for (const Segment& segment : segments_) {
    n_waiting += segment.page != nullptr && !segment.page->shape.packed ? segment.page->used : 0;
  }
  bool keeps_page = true;
  for (std::uint32_t id = 0; id < segments_.size(); ++id) {
    if (segments_[id].page == nullptr || segments_[id].page->shape.packed) {
      continue;
    }
    const std::uint32_t capacity = segments_[id].page->capacity();
    for (std::uint32_t slot = 0; slot < capacity; ++slot) {
      if (segments_[id].page->cells[slot] == kNoCell) {
        continue;
      }
      const Expected<std::uint32_t> to = packed_page_with_room(n_waiting);
      if (!to) {
        return to.error();
      }
      move_token(id, slot, *to);
      --n_waiting;
    }
    if (keeps_page && capacity <= kMostGenerated && std::uint64_t{capacity} * 256 <= n_live_) {
      keeps_page = false;
      segments_[id].page->has_non_finite = false;
    } else {
      free_segment(id);
    }
  }
  return ok_status();
}

Status LayerCache::compact_pages(bool packed) {
  for (;;) {
    std::uint32_t first_with_room = UINT32_MAX, last = UINT32_MAX;
    for (std::uint32_t id = 0; id < segments_.size(); ++id) {
      const StagingPage* page = segments_[id].page.get();
      if (page == nullptr || page->shape.packed != packed) {
        continue;
      }
      last = id;
      first_with_room = first_with_room == UINT32_MAX && !page->is_full() ? id : first_with_room;
    }
    if (first_with_room == UINT32_MAX) {
      return ok_status();
    }
    const StagingPage& from = *segments_[last].page;
    if (from.used == 0) {
      free_segment(last);
    } else if (first_with_room == last) {
      return packed && from.capacity() > fitting(from.used) ? resize_page(last, fitting(from.used))
                                                            : ok_status();
    } else {
      const auto slot = static_cast<std::uint32_t>(
          std::find_if(from.cells.begin(), from.cells.end(),
                       [](std::uint32_t cell) { return cell != kNoCell; }) -
          from.cells.begin());
      move_token(last, slot, first_with_room);
    }
  }
}

void LayerCache::settle_staging() {
  try {
    // Where memory is short, tokens stay where they are.
    if (packs() && !pack_staged()) {
      return;
    }
    (void)compact_pages(packs());
    if (packs() && newest_cells_.size() > kMostGenerated) {
      while (!segments_.empty() && segments_.back().page == nullptr &&
             segments_.back().block == nullptr) {
        segments_.pop_back();
      }
      segments_.shrink_to_fit();
    }
  } catch (const std::bad_alloc&) {
    return;
  }
}

}  // namespace zipcache::cache
