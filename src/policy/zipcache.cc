// zipcache: more bits for salient tokens. Mode `default` is what measured best here; `paper` and
// `official` follow the publication's text and code.
#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

enum class Mode : std::uint8_t { kDefault, kPaper, kOfficial };

constexpr std::array<Named<Mode>, 3> kModes{{
    {"default", Mode::kDefault},
    {"paper", Mode::kPaper},
    {"official", Mode::kOfficial},
}};

// What of a range to keep, by width: measured on SmolLM2-135M, where clipping 2-bit codes divides
// the KL divergence by three and clipping 4-bit keys hurts.
float key_clip(int bits) { return bits == 2 ? 0.7f : bits == 3 ? 0.9f : 1.0f; }
float value_clip(int bits) { return bits == 2 ? 0.75f : 1.0f; }

Policy default_preset() {
  Policy policy;
  policy.key.n_classes = policy.value.n_classes = 2;
  policy.key.bits = {4, 2};
  policy.key.salient_bp = 2000;
  policy.key.wide_bp = 5000;
  policy.key.class_multiple = 16;  // keys: lanes are tokens, 16 at a time
  policy.value.granularity = format::Granularity::kChannelSeparable;
  policy.value.token_params = format::TokenParams::kByte;
  policy.value.bits = {3, 2};
  policy.value.rules.keep_length = true;
  policy.value.salient_bp = 5000;
  policy.value.class_multiple = 32;  // values: a word of a 1-bit plane holds 32 tokens
  // A short prompt pays for every token that waits: few do, in 8 bits (decision 0008).
  policy.staging_bits = 8;
  policy.sink_tokens = 2;
  policy.hold_tokens = 28;
  policy.hold_share_bp = 300;
  policy.hold_after = 512;
  policy.chunk_tokens = 16;
  policy.min_ranked_tokens = 48;  // smaller blocks gain nothing by a second class's parameters
  policy.seal_multiple = 16;      // lanes of a group: what lacks to it is padding
  policy.append_tokens = 16;      // decoded tokens join the last block (decision 0009)
  policy.rest_tokens = 3;         // more cost less in a padded group than they cost to wait
  return policy;
}

Policy published_preset(Mode mode) {
  Policy policy;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->n_classes = 2;
    tensor->bits = {4, 2};
    tensor->salient_bp = 6000;
  }
  policy.value.granularity = format::Granularity::kChannelSeparable;
  policy.value.slot_shared = true;
  seal_as_published(policy);
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

Policy make(SettingReader& in) {
  const Mode mode = in.choice("mode", kModes, Mode::kDefault);
  const bool measured = mode == Mode::kDefault;
  Policy policy = measured ? default_preset() : published_preset(mode);
  read_tensor(in, "key", 2, measured ? key_clip : nullptr, policy.key);
  policy.key.wide_bp = policy.key.bits[1] == 2 ? policy.key.wide_bp : 0;
  read_wide_channels(in, policy.key);
  read_tensor(in, "value", 2, measured ? value_clip : nullptr, policy.value);
  policy.value.token_params = in.choice("value-params", kTokenParams, policy.value.token_params);
  if (policy.value.slot_shared && policy.value.token_params != format::TokenParams::kHalf) {
    in.reject("value-params", "but mode '" + std::string(name_of(kModes, mode)) +
                                  "' shares them over the heads, which takes 'half'");
  }
  if (measured) {
    read_budget(in, policy);
    policy.min_ranked_tokens = policy.kv_centibits == 0 ? policy.min_ranked_tokens : 0;
  } else {
    in.reject("kv-bits", "but the widths of mode '" + std::string(name_of(kModes, mode)) +
                             "' are those of the publication");
  }
  read_schedule(in, policy);
  read_staging(in, policy);
  if (measured) {
    policy.append_tokens =
        in.count("append", {.min = 4, .max = 64, .or_zero = true}, policy.append_tokens);
  } else {
    in.reject("append",
              "but blocks of mode '" + std::string(name_of(kModes, mode)) + "' don't grow");
  }
  read_ranking(in, policy);
  return policy;
}

}  // namespace

Method zipcache_method() {
  return {"zipcache",
          "more bits for salient tokens; measured best here",
          {"mode",     "kv-bits",  "key-bits",        "value-bits", "key-salient",  "value-salient",
           "key-clip", "key-wide", "key-wide-bits",   "value-clip", "value-params", "sinks",
           "hold",     "seal",     "block",           "hold-share", "append",       "staging-bits",
           "metric",   "probes",   "probe-positions", "seed"},
          make,
          {{"paper", "the paper's text: 4 and 2 bits, 60 % salient"},
           {"official", "the published code: re-quantizes everything each time"}}};
}

}  // namespace zipcache::policy
