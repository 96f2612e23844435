// The words that settings and logs use for enumerators, each written once. Internal to this room.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "policy/policy.h"

namespace zipcache::policy {

template <typename T>
struct Named {
  std::string_view name;
  T value;
};

inline constexpr std::array<Named<saliency::Metric>, 7> kMetrics{{
    {"normalized", saliency::Metric::kNormalized},
    {"accumulated", saliency::Metric::kAccumulated},
    {"official", saliency::Metric::kOfficial},
    {"random", saliency::Metric::kRandom},
    {"locality", saliency::Metric::kLocality},
    {"last-token", saliency::Metric::kLastToken},
    {"roco", saliency::Metric::kRoco},
}};

inline constexpr std::array<Named<saliency::ProbeRule>, 7> kProbeRules{{
    {"default", saliency::ProbeRule::kDefault},
    {"official", saliency::ProbeRule::kOfficial},
    {"all", saliency::ProbeRule::kAll},
    {"recent", saliency::ProbeRule::kRecent},
    {"random", saliency::ProbeRule::kRandom},
    {"last", saliency::ProbeRule::kLast},
    {"special", saliency::ProbeRule::kSpecial},
}};

inline constexpr std::array<Named<format::TokenParams>, 2> kTokenParams{{
    {"byte", format::TokenParams::kByte},
    {"half", format::TokenParams::kHalf},
}};

inline constexpr std::array<Named<std::uint8_t>, 2> kStagingBits{{{"8", 8}, {"16", 16}}};

inline constexpr std::array<Named<format::Granularity>, 3> kGranularities{{
    {"channelwise", format::Granularity::kChannelwise},
    {"tokenwise", format::Granularity::kTokenwise},
    {"channel-separable", format::Granularity::kChannelSeparable},
}};

// REQUIRES: the table names `value`.
template <typename T, std::size_t N>
constexpr std::string_view name_of(const std::array<Named<T>, N>& table, T value) {
  for (const Named<T>& entry : table) {
    if (entry.value == value) {
      return entry.name;
    }
  }
  contract_violated(__FILE__, __LINE__, "the table names every value");
}

}  // namespace zipcache::policy
