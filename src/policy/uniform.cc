// uniform: one width for all tokens, in the granularities that the paper compares (its Table 1).
#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

enum class UniformGranularity : std::uint8_t {
  kChannelwiseCst,
  kChannelwiseTokenwise,
  kTokenwise,
  kGroupwise,
};

constexpr std::array<Named<UniformGranularity>, 4> kUniformGranularities{{
    {"channelwise+cst", UniformGranularity::kChannelwiseCst},
    {"channelwise+tokenwise", UniformGranularity::kChannelwiseTokenwise},
    {"tokenwise", UniformGranularity::kTokenwise},
    {"groupwise", UniformGranularity::kGroupwise},
}};

constexpr std::uint16_t kDefaultGroup = 32;

void read_granularity(SettingReader& in, Policy& policy) {
  const UniformGranularity granularity =
      in.choice("granularity", kUniformGranularities, UniformGranularity::kChannelwiseCst);
  policy.value.granularity = format::Granularity::kTokenwise;
  switch (granularity) {
    case UniformGranularity::kChannelwiseCst:
      policy.value.granularity = format::Granularity::kChannelSeparable;
      break;
    case UniformGranularity::kChannelwiseTokenwise:
      break;
    case UniformGranularity::kTokenwise:
      policy.key.granularity = format::Granularity::kTokenwise;
      break;
    case UniformGranularity::kGroupwise:
      policy.key.granularity = format::Granularity::kTokenwise;
      policy.key.group_channels = policy.value.group_channels =
          read_group(in, "group", kDefaultGroup);
      return;
  }
  in.reject("group", "but only granularity 'groupwise' has groups");
}

Policy make(SettingReader& in) {
  Policy policy;
  policy.key.bits = policy.value.bits = {4, 4};
  policy.sink_tokens = 0;
  policy.hold_tokens = kFillWindow;
  read_tensor(in, "key", 1, nullptr, policy.key);
  read_tensor(in, "value", 1, nullptr, policy.value);
  read_granularity(in, policy);
  policy.value.token_params = in.choice("value-params", kTokenParams, policy.value.token_params);
  read_schedule(in, policy);
  return policy;
}

}  // namespace

Method uniform_method() {
  return {"uniform",
          "one width for all tokens, quantized channelwise, tokenwise or groupwise",
          {"key-bits", "value-bits", "key-clip", "value-clip", "granularity", "group",
           "value-params", "sinks", "hold", "seal", "block"},
          make,
          {}};
}

}  // namespace zipcache::policy
