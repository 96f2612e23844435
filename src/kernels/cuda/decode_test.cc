// Decode attention against the formula in double, over widths, head dims, groups, lengths, tails,
// batches and cuts of the work.
#include <gtest/gtest.h>

#include <numeric>

#include "kernels/cuda/decode_case.h"

namespace zipcache::cuda {
namespace {

using DecodeTest = DeviceTest;

constexpr int kWidths[] = {2, 3, 4, 8};

// 60 % of the tokens in class 0.
std::vector<int> mixed(int n) { return {n * 6 / 10, n - n * 6 / 10}; }
// The classes of the default policy: keys 4 bits for 20 % of the tokens and half of the channels,
// else 2; values 3 bits for 50 %, else 2.
std::vector<PageClass> default_classes(int head_dim) {
  const auto wide = static_cast<std::uint8_t>(head_dim / 2 / kChunkChannels);
  return {{4, 3}, {2, 3, wide, 4}, {2, 2, wide, 4}};
}
std::vector<int> three(int n) { return {n / 5, n * 3 / 10, n - n * 3 / 10 - n / 5}; }

// Returns the launch's blocks per cluster.
int check(const DecodeCase& c) {
  const HostCache cache = make_cache(c);
  const std::vector<Outputs> got = run_decode(c, cache, 2);
  EXPECT_EQ(got[0].out, got[1].out);  // the same bits in every run
  EXPECT_EQ(got[0].lse, got[1].lse);
  expect_attention(c, cache, got[0]);
  return got[0].cluster_blocks;
}

TEST_F(DecodeTest, EveryPairOfWidths) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int key_bits : kWidths) {
      for (const int value_bits : kWidths) {
        SCOPED_TRACE(::testing::Message()
                     << "head_dim " << head_dim << ", K " << key_bits << ", V " << value_bits);
        DecodeCase c;
        c.head_dim = head_dim;
        c.n_kv_heads = 1;
        c.classes = {{static_cast<std::uint8_t>(key_bits), static_cast<std::uint8_t>(value_bits)}};
        c.class_tokens = {{715}};
        c.seed = key_bits * 10 + value_bits;
        check(c);
      }
    }
  }
}

// Few, half and most of the channels wide, values of several widths.
TEST_F(DecodeTest, WideChannels) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int chunks : wide_chunk_counts(head_dim)) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << chunks << " chunks");
      DecodeCase c;
      c.head_dim = head_dim;
      c.classes = {
          {4, 4},
          {2, static_cast<std::uint8_t>(kWidths[chunks % 4]), static_cast<std::uint8_t>(chunks), 4},
          {2, 2, static_cast<std::uint8_t>(chunks), 4}};
      c.class_tokens = {{70, 200, 333}, {0, 1, 65}};
      c.tail = {19, 0};
      c.n_segments = 2;
      c.seed = chunks;
      check(c);
    }
  }
}

TEST_F(DecodeTest, EveryLength) {
  for (const int n : {0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4097}) {
    for (const int head_dim : {64, 128, 256}) {
      if (head_dim != 128 && n > 1000) {
        continue;
      }
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", " << n << " tokens");
      DecodeCase c;
      c.head_dim = head_dim;
      c.class_tokens = {mixed(n)};
      c.seed = n;
      check(c);
      c.classes = default_classes(head_dim);
      c.class_tokens = {three(n)};
      check(c);
    }
  }
}

TEST_F(DecodeTest, EveryGroup) {
  for (int group = 1; group <= 8; ++group) {
    for (const int head_dim : {64, 128, 256}) {
      SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", group " << group);
      DecodeCase c;
      c.head_dim = head_dim;
      c.n_kv_heads = 3;
      c.group = group;
      c.class_tokens = {mixed(517)};
      c.tail = {37};
      c.seed = group;
      check(c);
    }
  }
}

TEST_F(DecodeTest, EmptyClasses) {
  DecodeCase c;
  for (const std::vector<int>& tokens : {std::vector<int>{0, 100}, {100, 0}, {0, 0}}) {
    c.class_tokens = {tokens, mixed(65)};
    check(c);
  }
}

TEST_F(DecodeTest, EveryTail) {
  for (const int tail : {0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 95, 96, 97, 127, 128}) {
    for (const int n : {0, 64, 500}) {
      for (const int head_dim : {64, 128, 256}) {
        SCOPED_TRACE(::testing::Message()
                     << "head_dim " << head_dim << ", tail " << tail << ", " << n << " sealed");
        DecodeCase c;
        c.head_dim = head_dim;
        c.n_kv_heads = 1;
        c.class_tokens = {mixed(n)};
        c.tail = {tail};
        c.seed = tail + n;
        check(c);
      }
    }
  }
}

// The step's own token comes with the launch: into tails with blocks of their own, behind pages,
// with and without sealed tokens, one per thread and more.
TEST_F(DecodeTest, StoresTheStepsToken) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int group : {1, 3, 8}) {
      for (const int resident_blocks : {0, 1, 5, 264}) {
        SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", group " << group << ", "
                                          << resident_blocks << " blocks");
        DecodeCase c;
        c.head_dim = head_dim;
        c.group = group;
        c.class_tokens = {mixed(300), mixed(0), mixed(64)};
        c.tail = {1, 33, 128};
        c.resident_blocks = resident_blocks;
        c.stores = true;
        check(c);
      }
    }
  }
}

TEST_F(DecodeTest, BatchesOfUnequalLengths) {
  DecodeCase c;
  c.class_tokens = {mixed(3), mixed(2000), mixed(0), mixed(129), mixed(64), mixed(777)};
  c.tail = {128, 0, 5, 33, 64, 1};
  for (const int resident_blocks : {0, 1, 3, 50}) {
    SCOPED_TRACE(resident_blocks);
    c.resident_blocks = resident_blocks;
    check(c);
  }
}

TEST_F(DecodeTest, SegmentsWithScaleSetsOfTheirOwn) {
  DecodeCase c;
  c.class_tokens = {mixed(1500), mixed(900)};
  c.tail = {17, 99};
  c.n_segments = 5;
  c.classes = {{4, 4}, {2, 2}};
  check(c);
  c.classes = {{4, 2}, {8, 3}};
  check(c);
  c.classes = default_classes(c.head_dim);
  c.class_tokens = {three(1500), three(900)};
  check(c);
}

// Runs of a set shorter than a tile for each warp: pages of several sets share an item, with a page
// or two of a set, and a block of threads folds more sets than fit at a time.
TEST_F(DecodeTest, ItemsOfSeveralSets) {
  for (const int head_dim : {64, 128, 256}) {
    for (const int group : {1, 4, 8}) {
      for (const std::vector<int>& pages : {std::vector<int>{2, 2, 4}, {1, 3, 5}}) {
        SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", group " << group << ", "
                                          << pages[0] << " pages of the first class");
        DecodeCase c;
        c.head_dim = head_dim;
        c.n_kv_heads = 1;
        c.group = group;
        c.n_segments = 4;
        c.classes = default_classes(head_dim);
        c.class_tokens.emplace_back();
        for (const int n : pages) {
          c.class_tokens[0].push_back(n * kPageTokens * c.n_segments);
        }
        c.tail = {7};
        for (const int resident_blocks : {1, 2}) {
          c.resident_blocks = resident_blocks;
          check(c);
        }
      }
    }
  }
}

// A row's four blocks merge in each other's shared memory: rows alone in their launch, beside
// others with blocks by themselves, with tails.
TEST_F(DecodeTest, RowsInClusters) {
  const int n = 8 * kPageTokens;
  for (const int head_dim : {64, 128, 256}) {
    for (const int group : {1, 2, 3, 4, 7}) {
      for (const bool with_others : {false, true}) {
        SCOPED_TRACE(::testing::Message() << "head_dim " << head_dim << ", group " << group
                                          << (with_others ? ", with others" : ""));
        DecodeCase c;
        c.head_dim = head_dim;
        c.n_kv_heads = with_others ? 2 : 1;
        c.group = group;
        c.class_tokens = {{n, n}};
        c.resident_blocks = 4;
        if (with_others) {
          c.class_tokens.insert(c.class_tokens.end(), {{n / 8, 1}, {n - 7, n}});
          c.tail = {40, 128, 0};
          c.resident_blocks = 17;
        }
        const bool has_clusters = prepare_decode(head_dim, group, c.classes)->resident_clusters > 0;
        EXPECT_EQ(check(c), has_clusters ? kClusterBlocks : 1);
      }
    }
  }
}

// How the work is cut must not matter beyond rounding; one block with everything is the longest
// sum.
TEST_F(DecodeTest, LongRowsInFewBlocks) {
  DecodeCase c;
  c.n_kv_heads = 1;
#if defined(ZC_CUDA_EMULATION)
  c.class_tokens = {mixed(2'000)};
#else
  c.class_tokens = {mixed(40'000)};
#endif
  for (const int resident_blocks : {1, 2, 132}) {
    SCOPED_TRACE(resident_blocks);
    c.resident_blocks = resident_blocks;
    check(c);
  }
}

TEST_F(DecodeTest, ManyRows) {
  DecodeCase c;
  c.n_kv_heads = 8;
  for (int sequence = 0; sequence < 24; ++sequence) {
    c.class_tokens.push_back(mixed(100 + 37 * sequence));
    c.tail.push_back(sequence * 5);
  }
  check(c);
}

TEST_F(DecodeTest, NamesWhatIsMissing) {
  const PageClass fine[] = {{4, 4}}, odd[] = {{5, 4}};
  EXPECT_EQ(prepare_decode(96, 4, fine).error().message,
            "cuda decode: required head_dim 96, supported head_dim 64, 128, 256, missing a kernel "
            "for it");
  EXPECT_FALSE(prepare_decode(128, 9, fine));
  EXPECT_FALSE(prepare_decode(128, 4, odd));
  const PageClass wide[] = {{2, 2, 2, 4}}, all_wide[] = {{2, 2, 4, 4}}, wider[] = {{3, 2, 2, 8}};
  EXPECT_TRUE(prepare_decode(128, 4, wide));
  EXPECT_FALSE(prepare_decode(128, 4, all_wide));
  EXPECT_FALSE(prepare_decode(128, 4, wider));
  EXPECT_TRUE(prepare_decode(128, 8, fine));
}

}  // namespace
}  // namespace zipcache::cuda
