#include "policy/shared_settings.h"

#include <algorithm>

namespace zipcache::policy {
namespace {

constexpr std::uint32_t kWindowTokens = 32;
constexpr std::uint32_t kMaxTokens = 65536;
constexpr std::uint32_t kMinBlockTokens = 16;

}  // namespace

void read_tensor(SettingReader& in, const std::string& name, std::size_t max_classes,
                 float (*default_clip)(int bits), TensorPolicy& tensor, bool exact_high) {
  std::vector<std::uint8_t> bits(tensor.bits.begin(), tensor.bits.begin() + tensor.n_classes);
  bits = in.bits(name + "-bits", max_classes, bits, exact_high);
  tensor.n_classes = static_cast<std::uint8_t>(bits.size());
  tensor.bits = {bits.front(), bits.back()};
  if (tensor.n_classes == 1) {
    tensor.salient_bp = 10000;
    tensor.class_multiple = 1;
    in.reject(name + "-salient", "but " + name + "-bits gives all tokens the same width");
  } else {
    tensor.salient_bp = in.percent(name + "-salient", tensor.salient_bp);
  }
  if (default_clip != nullptr) {
    tensor.rules.clip = {default_clip(tensor.bits[0]), default_clip(tensor.bits[1])};
  }
  tensor.rules.clip = in.clip(name + "-clip", tensor.n_classes, tensor.rules.clip);
}

void read_wide_channels(SettingReader& in, TensorPolicy& key) {
  key.wide_bp = in.percent("key-wide", key.wide_bp);
  if (key.wide_bp == 0) {
    in.reject("key-wide-bits", "but key-wide 0 leaves no channels for them");
    return;
  }
  key.wide_bits = in.bits("key-wide-bits", 1, {key.wide_bits}).front();
}

void read_budget(SettingReader& in, Policy& policy) {
  policy.kv_centibits = in.hundredths("kv-bits", {.min = 220, .max = 400, .or_zero = true}, 0);
  if (policy.kv_centibits == 0) {
    return;
  }
  for (const std::string_view share : {"key-salient", "value-salient", "key-wide"}) {
    in.override(share, "but kv-bits chooses it");
  }
  if (policy.key.n_classes != 2 || policy.value.n_classes != 2) {
    in.reject("kv-bits", "but key-bits or value-bits gives all tokens the same width");
  }
}

std::uint16_t read_group(SettingReader& in, std::string_view name, std::uint16_t fallback) {
  return static_cast<std::uint16_t>(in.count(name, {.min = 16, .max = 512, .step = 16}, fallback));
}

void read_schedule(SettingReader& in, Policy& policy) {
  const std::uint32_t step = policy.seal_multiple;
  const std::uint32_t least = std::max(kMinBlockTokens, step);
  policy.sink_tokens = in.count("sinks", {.max = 4096}, policy.sink_tokens);
  if (policy.hold_tokens == kFillWindow) {
    policy.hold_tokens = kWindowTokens - policy.sink_tokens % kWindowTokens;
  }
  policy.hold_tokens = in.count("hold", {.max = kMaxTokens}, policy.hold_tokens);
  policy.seal_tokens =
      in.count("seal", {.min = least, .max = kMaxTokens, .step = step}, policy.seal_tokens);
  policy.block_tokens =
      in.count("block", {.min = least, .max = kMaxTokens, .step = step, .or_zero = true},
               policy.block_tokens);
}

void read_staging(SettingReader& in, Policy& policy) {
  policy.hold_share_bp = in.percent("hold-share", policy.hold_share_bp);
  policy.staging_bits = in.choice("staging-bits", kStagingBits, policy.staging_bits);
}

void read_ranking(SettingReader& in, Policy& policy) {
  policy.metric = in.choice("metric", kMetrics, policy.metric);
  const bool by_last_row = policy.metric == saliency::Metric::kLastToken;
  if (by_last_row || policy.metric == saliency::Metric::kRoco) {
    policy.probes = by_last_row ? saliency::ProbeRule::kLast : saliency::ProbeRule::kAll;
  }
  policy.probes = in.choice("probes", kProbeRules, policy.probes);
  if (by_last_row && policy.probes != saliency::ProbeRule::kLast) {
    in.reject("probes", "but metric 'last-token' measures the last query alone");
  }
  if (policy.probes == saliency::ProbeRule::kSpecial) {
    policy.probe_positions = in.positions("probe-positions");
    if (policy.probe_positions.empty()) {
      in.fail("probe-positions", "missing; probes 'special' needs them");
    }
  } else {
    in.reject("probe-positions", "but only probes 'special' have positions");
  }
  policy.seed = in.seed("seed", policy.seed);
}

void seal_as_published(Policy& policy) {
  policy.sink_tokens = 0;
  policy.hold_tokens = 0;
  policy.seal_tokens = 100;
  policy.seal_multiple = 1;
  policy.block_tokens = 0;
  policy.seal_chunks = true;
  policy.min_ranked_tokens = 20;
}

}  // namespace zipcache::policy
