// A policy as text: one line for people, and the settings that make it again.
#include <charconv>

#include "policy/names.h"
#include "policy/policy.h"

namespace zipcache::policy {
namespace {

// "30", "12.5", "0.05"
std::string percent_text(std::uint32_t basis_points) {
  std::string text = std::to_string(basis_points / 100);
  const std::uint32_t hundredths = basis_points % 100;
  if (hundredths != 0) {
    text += '.';
    text += static_cast<char>('0' + hundredths / 10);
    if (hundredths % 10 != 0) {
      text += static_cast<char>('0' + hundredths % 10);
    }
  }
  return text;
}

// The shortest decimal that reads back as the same float.
std::string float_text(float value) {
  std::array<char, 32> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  return {buffer.data(), end};
}

// The texts of the classes that there are, e.g. "4,3" or "4".
std::string per_class(const TensorPolicy& tensor, char separator, const std::string& class0,
                      const std::string& class1) {
  return tensor.n_classes == 1 ? class0 : class0 + separator + class1;
}
std::string bits_text(const TensorPolicy& tensor, char separator) {
  return per_class(tensor, separator, std::to_string(tensor.bits[0]),
                   std::to_string(tensor.bits[1]));
}
std::string clip_text(const TensorPolicy& tensor, char separator) {
  return per_class(tensor, separator, float_text(tensor.rules.clip[0]),
                   float_text(tensor.rules.clip[1]));
}

UniformGranularity uniform_granularity(const Policy& policy) {
  if (policy.key.group_channels != 0) {
    return UniformGranularity::kGroupwise;
  }
  if (policy.key.granularity == format::Granularity::kTokenwise) {
    return UniformGranularity::kTokenwise;
  }
  return policy.value.granularity == format::Granularity::kTokenwise
             ? UniformGranularity::kChannelwiseTokenwise
             : UniformGranularity::kChannelwiseCst;
}

// "channelwise 4/3 bits (30 % salient, clip 1/0.9)"
std::string describe_tensor(const TensorPolicy& tensor) {
  std::string text(name_of(kGranularities, tensor.granularity));
  if (tensor.group_channels != 0) {
    text += " by " + std::to_string(tensor.group_channels);
  }
  text += " " + bits_text(tensor, '/') + " bits (";
  if (tensor.n_classes == 2) {
    text += percent_text(tensor.salient_bp) + " % salient, ";
  }
  text += "clip " + clip_text(tensor, '/');
  if (tensor.granularity != format::Granularity::kChannelwise) {
    text += ", " + std::string(name_of(kTokenParams, tensor.token_params)) + " params";
    text += tensor.slot_shared ? " shared over heads" : "";
  }
  if (tensor.rules.rounding == quant::Rounding::kIntegerOffset) {
    text += ", integer offset";
  }
  return text + ")";
}

std::string describe_schedule(const Policy& policy) {
  std::string text = std::to_string(policy.sink_tokens) + " sinks, hold " +
                     std::to_string(policy.hold_tokens) + ", seal " +
                     std::to_string(policy.seal_tokens) + " in ";
  text +=
      policy.block_tokens == 0 ? "one block" : "blocks of " + std::to_string(policy.block_tokens);
  return text + (policy.requantize_all ? ", re-quantizing all" : "");
}

}  // namespace

std::string describe(const Policy& policy) {
  std::string text(name_of(kKinds, policy.kind));
  if (!policy.seals()) {
    return text + ": every token exact";
  }
  if (policy.kind == Kind::kZipcache) {
    text += " " + std::string(name_of(kModes, policy.mode));
  }
  text += ": K " + describe_tensor(policy.key) + ", V " + describe_tensor(policy.value) + "; " +
          describe_schedule(policy);
  if (policy.kind == Kind::kZipcache) {
    text += "; metric " + std::string(name_of(kMetrics, policy.metric)) + ", probes " +
            std::string(name_of(kProbeRules, policy.probes)) + ", seed " +
            std::to_string(policy.seed);
  }
  return text;
}

std::map<std::string, std::string> to_settings(const Policy& policy) {
  std::map<std::string, std::string> settings{
      {"policy", std::string(name_of(kKinds, policy.kind))}};
  if (!policy.seals()) {
    return settings;
  }
  const auto add_tensor = [&settings](const std::string& name, const TensorPolicy& tensor) {
    settings[name + "-bits"] = bits_text(tensor, ',');
    settings[name + "-clip"] = clip_text(tensor, ',');
    if (tensor.n_classes == 2) {
      settings[name + "-salient"] = percent_text(tensor.salient_bp);
    }
  };
  add_tensor("key", policy.key);
  add_tensor("value", policy.value);
  settings["value-params"] = name_of(kTokenParams, policy.value.token_params);
  settings["sinks"] = std::to_string(policy.sink_tokens);
  settings["hold"] = std::to_string(policy.hold_tokens);
  settings["seal"] = std::to_string(policy.seal_tokens);
  settings["block"] = std::to_string(policy.block_tokens);
  if (policy.kind == Kind::kUniform) {
    const UniformGranularity granularity = uniform_granularity(policy);
    settings["granularity"] = name_of(kUniformGranularities, granularity);
    if (granularity == UniformGranularity::kGroupwise) {
      settings["group"] = std::to_string(policy.key.group_channels);
    }
  } else {
    settings["mode"] = name_of(kModes, policy.mode);
    settings["metric"] = name_of(kMetrics, policy.metric);
    settings["probes"] = name_of(kProbeRules, policy.probes);
    settings["seed"] = std::to_string(policy.seed);
  }
  return settings;
}

}  // namespace zipcache::policy
