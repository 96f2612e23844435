// Hands out ranges of an index space that grows at its end: first fit among what was freed.
#pragma once

#include <cstdint>
#include <map>

namespace zipcache::cuda {

class RangeAllocator {
 public:
  // With a chunk, no range crosses a multiple of it. REQUIRES: size <= chunk.
  explicit RangeAllocator(std::uint32_t chunk = 0) : chunk_(chunk) {}

  std::uint32_t allocate(std::uint32_t size) {
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second < size) {
        continue;
      }
      const std::uint32_t begin = it->first, left = it->second - size;
      free_.erase(it);
      if (left > 0) {
        free_[begin + size] = left;
      }
      return begin;
    }
    if (chunk_ != 0 && end_ / chunk_ != (end_ + size - 1) / chunk_) {
      const std::uint32_t next = (end_ / chunk_ + 1) * chunk_;
      free_[end_] = next - end_;
      end_ = next;
    }
    const std::uint32_t begin = end_;
    end_ += size;
    return begin;
  }

  void release(std::uint32_t begin, std::uint32_t size) {
    auto next = free_.lower_bound(begin);
    const auto joins = [this](std::uint32_t at) { return chunk_ == 0 || at % chunk_ != 0; };
    if (next != free_.end() && next->first == begin + size && joins(next->first)) {
      size += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == begin && joins(begin)) {
        before->second += size;
        return;
      }
    }
    free_[begin] = size;
  }

  std::uint32_t end() const { return end_; }  // one past the largest index ever in use
  void clear() { free_.clear(), end_ = 0; }

 private:
  const std::uint32_t chunk_;
  std::uint32_t end_ = 0;
  std::map<std::uint32_t, std::uint32_t> free_;  // begin -> size
};

}  // namespace zipcache::cuda
