// Byte accounting: what a cache really holds, by part, and an optional limit on it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace zipcache::cache {

// Bytes held by one or several caches. `ratio` counts every one of them.
struct ByteCount {
  std::size_t codes = 0;    // packed codes of sealed tokens
  std::size_t params = 0;   // scales, minima, channel factors
  std::size_t masks = 0;    // tiers, liveness, cell maps, block descriptors
  std::size_t staging = 0;  // rows of tokens that are not sealed, and their statistics
  std::size_t slack = 0;    // free slots of staging pages, sealed tokens that were overwritten
  std::size_t fp16 = 0;     // what the live tokens would take as fp16
  std::uint64_t live_tokens = 0;    // summed over layers
  std::uint64_t sealed_tokens = 0;  // of these, quantized

  std::size_t total() const { return codes + params + masks + staging + slack; }
  double ratio() const { return total() == 0 ? 0.0 : double(fp16) / double(total()); }
  double bits_per_element() const {
    return fp16 == 0 ? 0.0 : 16.0 * double(total()) / double(fp16);
  }

  ByteCount& operator+=(const ByteCount& other) {
    codes += other.codes;
    params += other.params;
    masks += other.masks;
    staging += other.staging;
    slack += other.slack;
    fp16 += other.fp16;
    live_tokens += other.live_tokens;
    sealed_tokens += other.sealed_tokens;
    return *this;
  }
};

// A limit shared by all caches of a context. Thread-safe.
class Budget {
 public:
  explicit Budget(std::size_t limit_bytes = SIZE_MAX) : limit_(limit_bytes) {}

  // False, and nothing changes, when the limit would be passed.
  bool reserve(std::size_t bytes) {
    std::size_t used = used_.load(std::memory_order_relaxed);
    do {
      if (bytes > limit_ - used) {
        return false;
      }
    } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
    return true;
  }
  void release(std::size_t bytes) { used_.fetch_sub(bytes, std::memory_order_relaxed); }
  std::size_t used() const { return used_.load(std::memory_order_relaxed); }
  std::size_t limit() const { return limit_; }

 private:
  const std::size_t limit_;
  std::atomic<std::size_t> used_{0};
};

}  // namespace zipcache::cache
