// gear and gear-l (arXiv 2403.05527): uniform codes, a low-rank term of what they miss, and (gear)
// outliers kept exact. At 4 bits keys share scales per channel and values per token ("KCVT"); at 2
// bits groups of 64 do, as in KIVI. A prompt chunk is compressed at once with rank 4, decoded
// tokens in buffers with rank 2. Shares of outliers are rounded per channel and, head by head, per
// token.
#include <algorithm>

#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

constexpr std::uint32_t kRank = 4;
constexpr std::uint32_t kMaxRank = 16;
constexpr std::uint32_t kStreamingRank = 2;
constexpr std::uint32_t kGroup = 64;          // at 2 bits
constexpr std::uint32_t kBuffer = 64;         // with groups
constexpr std::uint32_t kChannelBuffer = 20;  // without
constexpr std::uint32_t kOutlierBp = 200;
constexpr std::uint32_t kMaxBlock = 65536;  // places of outliers are 16 bits

Policy make(SettingReader& in, bool has_outliers) {
  Policy policy;
  policy.key.bits = policy.value.bits = {4, 4};
  policy.key.granularity = format::Granularity::kChannelwise;
  policy.value.granularity = format::Granularity::kTokenwise;
  read_tensor(in, "key", 1, nullptr, policy.key);
  read_tensor(in, "value", 1, nullptr, policy.value);
  const std::uint32_t group =
      in.count("group", {.min = 16, .max = 512, .step = 16, .or_zero = true},
               policy.key.bits[0] == 2 ? kGroup : 0);
  policy.key.group_tokens = policy.value.group_channels = static_cast<std::uint16_t>(group);

  seal_as_published(policy);
  policy.min_ranked_tokens = 0;
  policy.seal_tokens =
      in.count("seal", {.min = 16, .max = kMaxBlock}, group == 0 ? kChannelBuffer : kBuffer);
  policy.block_tokens = kMaxBlock;
  const auto rank = static_cast<std::uint8_t>(in.count("rank", {.max = kMaxRank}, kRank));
  const std::uint32_t outlier_bp = has_outliers ? in.percent("outliers", kOutlierBp) : 0;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->rank = rank;
    tensor->small_block_rank =
        static_cast<std::uint8_t>(std::min<std::uint32_t>(rank, kStreamingRank));
    tensor->small_block_tokens = policy.seal_tokens;
    tensor->outlier_bp = outlier_bp;
  }
  return policy;
}

}  // namespace

Method gear_method() {
  return {"gear",
          "uniform codes, a low-rank term of their error and exact outliers (GEAR)",
          {"key-bits", "value-bits", "key-clip", "value-clip", "group", "seal", "rank", "outliers"},
          [](SettingReader& in) { return make(in, true); },
          {}};
}

Method gear_l_method() {
  return {"gear-l",
          "uniform codes and a low-rank term of their error (GEAR-L)",
          {"key-bits", "value-bits", "key-clip", "value-clip", "group", "seal", "rank"},
          [](SettingReader& in) { return make(in, false); },
          {}};
}

}  // namespace zipcache::policy
