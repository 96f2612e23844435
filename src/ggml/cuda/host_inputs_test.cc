#include "ggml/cuda/host_inputs.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace zipcache::ggml {
namespace {

std::vector<std::byte> bytes(int value, std::size_t n) {
  return std::vector<std::byte>(n, static_cast<std::byte>(value));
}

class HostInputsTest : public testing::Test {
 protected:
  // Device memory that nobody reads.
  std::vector<std::byte> device_ = bytes(0, 4096);
  HostInputs inputs_;

  void write(std::size_t at, std::size_t n, int value) {
    inputs_.written(device_.data() + at, bytes(value, n).data(), n);
  }
  std::span<const std::byte> read(std::size_t at, std::size_t n) {
    return inputs_.bytes_of(device_.data() + at, n);
  }
};

TEST_F(HostInputsTest, WrittenBytesAreKnownOnceTheyAreWatchedUntilAGraphHasRun) {
  write(64, 32, 1);
  EXPECT_TRUE(read(64, 32).empty());  // watched from now on
  EXPECT_TRUE(read(64, 32).empty());
  write(64, 32, 2);
  const auto found = read(64, 32);
  ASSERT_EQ(found.size(), 32u);
  EXPECT_EQ(std::memcmp(found.data(), bytes(2, 32).data(), 32), 0);
  inputs_.forget();
  EXPECT_TRUE(read(64, 32).empty());
}

TEST_F(HostInputsTest, OnlyAWriteOfTheWholeRangeCounts) {
  for (const auto& [at, n] :
       {std::pair<std::size_t, std::size_t>{64, 16}, {80, 16}, {0, 65}, {95, 100}, {0, 4096}}) {
    read(64, 32);
    write(64, 32, 1);
    EXPECT_FALSE(read(64, 32).empty());
    write(at, n, 2);
    EXPECT_TRUE(read(64, 32).empty()) << at;
    inputs_.forget();
  }
  write(64, 32, 1);
  write(0, 64, 2);  // neighbours
  write(96, 8, 2);
  EXPECT_FALSE(read(64, 32).empty());
  inputs_.written(device_.data() + 70, 1);
  EXPECT_TRUE(read(64, 32).empty());
}

TEST_F(HostInputsTest, LentBytesStayWhenOthersAreWatched) {
  read(0, 8);
  write(0, 8, 3);
  const auto lent = read(0, 8);
  for (std::size_t n = 1; n < 40; ++n) {
    read(n * 16, 8);
  }
  ASSERT_EQ(lent.size(), 8u);
  EXPECT_EQ(read(0, 8).data(), lent.data());
  EXPECT_EQ(lent[7], std::byte{3});
  // Of many, the newest are watched.
  write(39 * 16, 8, 4);
  EXPECT_FALSE(read(39 * 16, 8).empty());
}

TEST_F(HostInputsTest, LargeRangesAreLeftToTheDevice) {
  EXPECT_TRUE(inputs_.bytes_of(device_.data(), 1 << 20).empty());
  inputs_.written(device_.data(), device_.data(), 16);
  EXPECT_TRUE(inputs_.bytes_of(device_.data(), 1 << 20).empty());
  EXPECT_TRUE(read(0, 0).empty());
}

}  // namespace
}  // namespace zipcache::ggml
