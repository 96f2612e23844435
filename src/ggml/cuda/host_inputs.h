// What the host wrote to the inputs of a graph. Masks and rows come from its memory by
// set_tensor(), so their bytes pass by here and need not be read back from the device. A range is
// watched from the first time that a graph has asked for it; then each write to it leaves a copy,
// which is good for the next graph only: what a graph's own kernels write goes unseen.
#pragma once

#include <algorithm>
#include <cstddef>
#include <list>
#include <span>
#include <vector>

namespace zipcache::ggml {

class HostInputs {
 public:
  // The bytes of a range of device addresses, until forget() or the next write; empty when they are
  // not known, or too many.
  std::span<const std::byte> bytes_of(const void* data, std::size_t size) {
    if (size == 0 || size > kMostBytes) {
      return {};
    }
    const auto* const first = static_cast<const std::byte*>(data);
    for (const Range& range : ranges_) {
      if (range.first == first && range.size == size) {
        return range.is_known ? std::span(range.copy) : std::span<const std::byte>();
      }
    }
    if (ranges_.size() >= kMostRanges) {  // one that is in nobody's hands, the oldest
      const auto unused = std::find_if(ranges_.begin(), ranges_.end(),
                                       [](const Range& range) { return !range.is_known; });
      if (unused == ranges_.end()) {
        return {};
      }
      ranges_.erase(unused);
    }
    ranges_.push_back({first, size, false, {}});
    return {};
  }

  // The host writes there.
  void written(const void* to, const void* data, std::size_t size) {
    const auto* const first = static_cast<const std::byte*>(to);
    for (Range& range : ranges_) {
      if (first >= range.first + range.size || range.first >= first + size) {
        continue;
      }
      range.is_known = range.first == first && range.size == size;
      if (range.is_known) {
        const auto* const bytes = static_cast<const std::byte*>(data);
        range.copy.assign(bytes, bytes + size);
      }
    }
  }
  // Or lets somebody else write there.
  void written(const void* to, std::size_t size) {
    const auto* const first = static_cast<const std::byte*>(to);
    for (Range& range : ranges_) {
      range.is_known &= first >= range.first + range.size || range.first >= first + size;
    }
  }

  // A graph has run.
  void forget() {
    std::for_each(ranges_.begin(), ranges_.end(), [](Range& range) { range.is_known = false; });
  }

 private:
  static constexpr std::size_t kMostRanges = 8;         // two of each group of layers
  static constexpr std::size_t kMostBytes = 512 << 10;  // above, the device summarizes sooner

  struct Range {
    const std::byte* first = nullptr;
    std::size_t size = 0;
    bool is_known = false;
    std::vector<std::byte> copy;
  };
  std::list<Range> ranges_;  // stable: spans of copies are lent
};

}  // namespace zipcache::ggml
