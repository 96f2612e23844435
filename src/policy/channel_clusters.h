// Channels of a head into groups of equal size that share a scale well (SKVQ). Internal to this
// room.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace zipcache::policy {

// The channels 0..n-1 in an order in which every `cluster_channels` neighbours are a cluster,
// ascending inside one. K-means on the points (low, high), but with clusters of equal size: from
// channels sorted by their range, two of different clusters change places for as long as that
// brings points nearer to their means.
// REQUIRES: finite numbers; cluster_channels divides n, the length of both.
std::vector<std::uint16_t> cluster_channels(std::span<const float> low, std::span<const float> high,
                                            std::uint32_t cluster_channels);

}  // namespace zipcache::policy
