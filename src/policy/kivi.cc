// kivi (arXiv 2402.02750): keys per channel in groups of G tokens, values per token in groups of G
// channels, at 2 or 4 bits, and a residual window R. Keys are quantized R at a time, the rest of
// the sequence (its length modulo R) is exact; of the values the newest R are exact. Values leave
// that window in blocks of 32 tokens here, one by one in the paper.
#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

constexpr std::uint32_t kGroup = 32;
constexpr std::uint32_t kResidual = 128;
constexpr std::uint32_t kMaxResidual = 4096;

Policy make(SettingReader& in) {
  Policy policy;
  policy.key.bits = policy.value.bits = {2, 2};
  policy.key.granularity = format::Granularity::kChannelwise;
  policy.value.granularity = format::Granularity::kTokenwise;
  policy.sink_tokens = 0;
  policy.hold_tokens = 0;
  policy.block_tokens = 0;
  read_tensor(in, "key", 1, nullptr, policy.key);
  read_tensor(in, "value", 1, nullptr, policy.value);
  const std::uint32_t group = in.count("group", {.min = 16, .max = 512, .step = 16}, kGroup);
  const std::uint32_t residual =
      in.count("residual", {.min = group, .max = kMaxResidual, .step = group, .or_zero = true},
               std::max(kResidual / group, 1u) * group);
  policy.key.group_tokens = policy.value.group_channels = static_cast<std::uint16_t>(group);
  policy.value_hold_tokens = residual;
  policy.seal_multiple = policy.seal_tokens = residual == 0 ? group : residual;
  return policy;
}

}  // namespace

Method kivi_method() {
  return {"kivi",
          "keys per channel in groups of tokens, values per token in groups of channels, newest "
          "tokens exact (KIVI)",
          {"key-bits", "value-bits", "key-clip", "value-clip", "group", "residual"},
          make,
          {}};
}

}  // namespace zipcache::policy
