// A step of generation allocates nothing unless the cache itself grows or seals.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cache/attention.h"
#include "cache/layer_cache.h"

namespace {

std::atomic<std::size_t> n_allocations{0};

void* allocate(std::size_t bytes, std::size_t alignment) {
  n_allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
// Sanitizers have one of their own that does not call the first.
void* operator new(std::size_t bytes, const std::nothrow_t& /*tag*/) noexcept {
  try {
    return allocate(bytes, alignof(std::max_align_t));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory, const std::nothrow_t& /*tag*/) noexcept { std::free(memory); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t /*alignment*/) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t /*bytes*/, std::align_val_t /*alignment*/) noexcept {
  std::free(memory);
}

namespace zipcache::cache {
namespace {

constexpr std::uint32_t kHeads = 4, kKvHeads = 2, kDim = 64, kCells = 2048;

class AllocationTest : public testing::Test {
 protected:
  AllocationTest() {
    cache_.set_heads(kKvHeads, kDim, kDim).value();
    query_.q_row_stride = query_.out_row_stride = std::size_t{kHeads} * kDim;
    query_.q_head_stride = query_.out_head_stride = kDim;
    query_.n_heads = kHeads;
    query_.visible = &visible_;
    query_.scale = 0.125f;
  }

  // Appends tokens and attends; returns the allocations of the cache's own work.
  std::size_t step(std::uint32_t n_tokens) {
    const std::uint32_t n_visible = n_tokens_ + n_tokens;
    std::vector<std::uint32_t> cells;
    std::vector<float> rows, q, out(std::size_t{n_tokens} * kHeads * kDim);
    std::vector<Half> mask(std::size_t{n_tokens} * kCells, 0xfc00);
    for (std::uint32_t row = 0; row < n_tokens; ++row) {
      cells.push_back(n_tokens_ + row);
      std::fill_n(mask.begin() + row * kCells, n_tokens_ + row + 1, Half{0});
      for (std::uint32_t i = 0; i < kKvHeads * kDim; ++i) {
        rows.push_back(std::sin(static_cast<float>((n_tokens_ + row) * 37 + i * i)));
      }
      for (std::uint32_t i = 0; i < kHeads * kDim; ++i) {
        q.push_back(std::cos(static_cast<float>((n_tokens_ + row) * 11 + i)));
      }
    }
    query_.q = q.data();
    query_.out = out.data();
    query_.n_rows = n_tokens;

    const std::size_t before = n_allocations.load();
    const RowsView view{rows.data(), kKvHeads * kDim * sizeof(float), false};
    const bool stored =
        cache_.put(Tensor::kKey, cells, view) && cache_.put(Tensor::kValue, cells, view);
    visible_.assign(mask.data(), kCells, n_tokens, kCells);
    const bool prepared = stored && attention_.prepare(cache_, query_, 1);
    attention_.run(0);
    const bool committed = attention_.commit() ? true : false;
    const std::size_t after = n_allocations.load();
    EXPECT_TRUE(prepared && committed);
    n_tokens_ = n_visible;
    return after - before;
  }

  // Changes when a page, a block or a piece of the cell map is made, or a page grows (every fourth
  // step here).
  std::size_t held_bytes() const { return cache_.bytes().total(); }

  std::shared_ptr<const policy::Policy> policy_ =
      std::make_shared<const policy::Policy>(policy::make_policy({}).value());
  std::shared_ptr<Budget> budget_ = std::make_shared<Budget>();
  LayerCache cache_{{0, kCells, kKvHeads* kDim, kKvHeads* kDim}, policy_, budget_};
  Attention attention_{*kernels::select_kernels("")};
  Visibility visible_;
  Query query_;
  std::uint32_t n_tokens_ = 0;
};

TEST_F(AllocationTest, GenerationInSteadyStateAllocatesNothing) {
  EXPECT_GT(step(1100), 0u);  // they are counted
  std::uint32_t n_steady = 0;
  for (int i = 0; i < 400; ++i) {
    const std::size_t held = held_bytes();
    const std::size_t n = step(1);
    // The first rounds of filling and sealing bring the buffers to their sizes.
    if (held_bytes() == held && i > 200) {
      EXPECT_EQ(n, 0u) << "step " << i;
      ++n_steady;
    }
  }
  EXPECT_GT(n_steady, 140u);
  EXPECT_GT(cache_.bytes().sealed_tokens, 1400u);
}

}  // namespace
}  // namespace zipcache::cache
