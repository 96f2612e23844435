// From settings to a checked policy: a preset by policy and mode, then the user's changes to it.
#include <optional>

#include "policy/names.h"
#include "policy/policy.h"
#include "policy/settings.h"

namespace zipcache::policy {
namespace {

constexpr std::uint32_t kWindowTokens = 32;  // sinks and held tokens together: keeps blocks aligned
constexpr std::uint32_t kMaxTokens = 65536;
constexpr std::uint16_t kDefaultGroup = 32;

// What of a range to keep, by width: measured on SmolLM2-135M, where clipping 2-bit codes divides
// the KL divergence by three and clipping 4-bit keys hurts.
float key_clip(int bits) { return bits == 2 ? 0.7f : bits == 3 ? 0.9f : 1.0f; }
float value_clip(int bits) { return bits == 2 ? 0.75f : 1.0f; }

Policy uniform_preset() {
  Policy policy;
  policy.kind = Kind::kUniform;
  policy.key.bits = policy.value.bits = {4, 4};
  policy.value.granularity = format::Granularity::kChannelSeparable;
  policy.sink_tokens = 0;
  return policy;
}

Policy default_preset() {
  Policy policy;
  policy.key.n_classes = policy.value.n_classes = 2;
  policy.key.bits = {4, 3};
  policy.key.salient_bp = 3000;
  policy.key.class_multiple = 16;  // keys: lanes are tokens, 16 at a time
  policy.value.granularity = format::Granularity::kChannelSeparable;
  policy.value.token_params = format::TokenParams::kByte;
  policy.value.bits = {3, 2};
  policy.value.salient_bp = 5000;
  policy.value.class_multiple = 32;  // values: a word of a 1-bit plane holds 32 tokens
  return policy;
}

Policy published_preset(Mode mode) {
  Policy policy;
  policy.mode = mode;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->n_classes = 2;
    tensor->bits = {4, 2};
    tensor->salient_bp = 6000;
  }
  policy.value.granularity = format::Granularity::kChannelSeparable;
  policy.value.slot_shared = true;
  policy.sink_tokens = 0;
  policy.hold_tokens = 0;
  policy.seal_tokens = 100;
  policy.seal_multiple = 1;
  policy.block_tokens = 0;
  if (mode == Mode::kPaper) {
    policy.value.class_factors = true;
    policy.key.rules.rounding = quant::Rounding::kIntegerOffset;
    policy.value.rules.rounding = quant::Rounding::kIntegerOffset;
  } else {
    policy.metric = saliency::Metric::kOfficial;
    policy.probes = saliency::ProbeRule::kOfficial;
    policy.requantize_all = true;
  }
  return policy;
}

Policy preset(Kind kind, Mode mode) {
  if (kind == Kind::kUniform) {
    return uniform_preset();
  }
  if (kind == Kind::kZipcache) {
    return mode == Mode::kDefault ? default_preset() : published_preset(mode);
  }
  Policy policy;
  policy.kind = kind;
  return policy;
}

// `name` is "key" or "value"; default_clip is nullptr where the preset clips nothing.
void read_tensor(SettingReader& in, const std::string& name, std::size_t max_classes,
                 float (*default_clip)(int bits), TensorPolicy& tensor) {
  std::vector<std::uint8_t> bits(tensor.bits.begin(), tensor.bits.begin() + tensor.n_classes);
  bits = in.bits(name + "-bits", max_classes, bits);
  tensor.n_classes = static_cast<std::uint8_t>(bits.size());
  tensor.bits = {bits.front(), bits.back()};
  if (tensor.n_classes == 1) {
    tensor.salient_bp = 10000;
    tensor.class_multiple = 1;
    in.reject(name + "-salient", "but " + name + "-bits gives all tokens the same width");
  }
  tensor.salient_bp = in.percent(name + "-salient", tensor.salient_bp);
  if (default_clip != nullptr) {
    tensor.rules.clip = {default_clip(tensor.bits[0]), default_clip(tensor.bits[1])};
  }
  tensor.rules.clip = in.clip(name + "-clip", tensor.n_classes, tensor.rules.clip);
}

void read_granularity(SettingReader& in, Policy& policy) {
  const UniformGranularity granularity =
      in.choice("granularity", kUniformGranularities, UniformGranularity::kChannelwiseCst);
  if (granularity != UniformGranularity::kGroupwise) {
    in.reject("group", "but only granularity 'groupwise' has groups");
  }
  if (granularity != UniformGranularity::kChannelwiseCst) {
    policy.value.granularity = format::Granularity::kTokenwise;
  }
  if (granularity == UniformGranularity::kTokenwise ||
      granularity == UniformGranularity::kGroupwise) {
    policy.key.granularity = format::Granularity::kTokenwise;
  }
  if (granularity == UniformGranularity::kGroupwise) {
    const CountRange range{.min = 16, .max = 512, .step = 16};
    const auto group = static_cast<std::uint16_t>(in.count("group", range, kDefaultGroup));
    policy.key.group_channels = policy.value.group_channels = group;
  }
}

void read_value_params(SettingReader& in, Policy& policy) {
  policy.value.token_params = in.choice("value-params", kTokenParams, policy.value.token_params);
  if (policy.value.slot_shared && policy.value.token_params != format::TokenParams::kHalf) {
    in.reject("value-params", "but mode '" + std::string(name_of(kModes, policy.mode)) +
                                  "' shares them over the heads, which takes 'half'");
  }
}

void read_schedule(SettingReader& in, Policy& policy) {
  const bool published = policy.mode != Mode::kDefault;
  const std::uint32_t multiple = policy.seal_multiple;
  const std::uint32_t least = published ? 16 : multiple;
  policy.sink_tokens = in.count("sinks", {.max = 4096}, policy.sink_tokens);
  const std::uint32_t hold = published ? 0 : kWindowTokens - policy.sink_tokens % kWindowTokens;
  policy.hold_tokens = in.count("hold", {.max = kMaxTokens}, hold);
  policy.seal_tokens =
      in.count("seal", {.min = least, .max = kMaxTokens, .step = multiple}, policy.seal_tokens);
  policy.block_tokens =
      in.count("block", {.min = least, .max = kMaxTokens, .step = multiple, .or_zero = true},
               policy.block_tokens);
}

}  // namespace

const std::vector<SettingHelp>& setting_help() {
  static const std::vector<SettingHelp> help = [] {
    std::vector<SettingHelp> all;
    for (const SettingSpec& spec : setting_specs()) {
      all.push_back(spec.help);
    }
    return all;
  }();
  return help;
}

Expected<Policy> make_policy(const std::map<std::string, std::string>& settings) {
  SettingReader in(settings);
  in.check_known();
  const Kind kind = in.choice("policy", kKinds, Kind::kZipcache);
  in.check_applies(kind);
  const Mode mode = in.choice("mode", kModes, Mode::kDefault);
  Policy policy = preset(kind, mode);

  if (policy.seals()) {
    const std::size_t max_classes = kind == Kind::kZipcache ? 2 : 1;
    const bool clips = kind == Kind::kZipcache && mode == Mode::kDefault;
    read_tensor(in, "key", max_classes, clips ? key_clip : nullptr, policy.key);
    read_tensor(in, "value", max_classes, clips ? value_clip : nullptr, policy.value);
    read_granularity(in, policy);
    read_value_params(in, policy);
    read_schedule(in, policy);
    policy.metric = in.choice("metric", kMetrics, policy.metric);
    policy.probes = in.choice("probes", kProbeRules, policy.probes);
    policy.seed = in.seed("seed", policy.seed);
  }
  if (in.error()) {
    return *in.error();
  }
  return policy;
}

}  // namespace zipcache::policy
