// A policy in one line.
#include "policy/names.h"
#include "policy/policy.h"
#include "policy/settings.h"

namespace zipcache::policy {
namespace {

// The texts of the classes that there are, e.g. "4/3" or "4".
std::string per_class(const TensorPolicy& tensor, const std::string& class0,
                      const std::string& class1) {
  return tensor.n_classes == 1 ? class0 : class0 + "/" + class1;
}

// "channelwise 4/3 bits (30 % salient, clip 1/0.9)"
std::string describe_tensor(const TensorPolicy& tensor, bool has_budget) {
  std::string text(name_of(kGranularities, tensor.granularity));
  if (tensor.group_channels != 0) {
    text += " by " + std::to_string(tensor.group_channels);
  }
  if (tensor.group_tokens != 0) {
    text += " by " + std::to_string(tensor.group_tokens) + " tokens";
  }
  text += " " + per_class(tensor, std::to_string(tensor.bits[0]), std::to_string(tensor.bits[1])) +
          " bits (";
  if (tensor.n_classes == 2 && !has_budget) {
    text += percent_text(tensor.salient_bp) + " % salient, ";
  }
  if (tensor.wide_bp > 0 ||
      (has_budget && tensor.granularity == format::Granularity::kChannelwise)) {
    text += (has_budget ? "some" : percent_text(tensor.wide_bp) + " %") + " of channels " +
            std::to_string(tensor.wide_bits) + " bits, ";
  }
  const auto& clip = tensor.rules.clip;
  text += "clip " + per_class(tensor, float_text(clip[0]), float_text(clip[1]));
  if (tensor.granularity != format::Granularity::kChannelwise) {
    text += ", " + std::string(name_of(kTokenParams, tensor.token_params)) + " params";
    text += tensor.slot_shared ? " shared over heads" : "";
  }
  if (tensor.rules.rounding == quant::Rounding::kIntegerOffset) {
    text += ", integer offset";
  }
  text += tensor.factors == Factors::kBalanced ? ", balanced by queries" : "";
  text += tensor.factors == Factors::kGiven ? ", calibrated factors" : "";
  text += tensor.reordered ? ", calibrated order" : "";
  if (tensor.rank != 0) {
    text += ", rank " + std::to_string(tensor.rank);
  }
  if (tensor.outlier_bp != 0) {
    text += ", " + percent_text(tensor.outlier_bp) + " % outliers";
  }
  return text + ")";
}

std::string describe_schedule(const Policy& policy) {
  std::string text =
      std::to_string(policy.sink_tokens) + " sinks, hold " + std::to_string(policy.hold_tokens);
  if (policy.hold_share_bp < 10000) {
    text += " or " + percent_text(policy.hold_share_bp) + " %";
  }
  text += policy.staging_bits == 8 ? ", 8 bits until sealed" : "";
  text += ", seal " + std::to_string(policy.seal_tokens) + " in ";
  text +=
      policy.block_tokens == 0 ? "one block" : "blocks of " + std::to_string(policy.block_tokens);
  if (policy.append_tokens != 0) {
    text += ", which " + std::to_string(policy.append_tokens) + " more may join";
  }
  if (policy.value_hold_tokens != 0) {
    text += ", newest " + std::to_string(policy.value_hold_tokens) + " values exact";
  }
  return text + (policy.requantize_all ? ", re-quantizing all" : "");
}

}  // namespace

std::string describe(const Policy& policy) {
  std::string text = policy.name;
  if (!policy.seals()) {
    return text + ": every token exact";
  }
  if (policy.evicts) {
    return text + ": " + percent_text(policy.key.salient_bp) + " % of most attention and newest " +
           percent_text(policy.hold_bp) + " % of the tokens exact, the others evicted " +
           std::to_string(policy.seal_tokens) + " at a time (reference implementation)";
  }
  const auto mode = policy.settings.find("mode");
  text += mode == policy.settings.end() ? "" : " " + mode->second;
  const bool budget = policy.kv_centibits > 0;
  if (budget) {
    text += " of at most " + percent_text(policy.kv_centibits) + " bits";
  }
  text += ": K " + describe_tensor(policy.key, budget) + ", V " +
          describe_tensor(policy.value, budget) + "; " + describe_schedule(policy);
  if (policy.settings.contains("metric")) {
    text += "; metric " + std::string(name_of(kMetrics, policy.metric)) + ", probes " +
            std::string(name_of(kProbeRules, policy.probes)) + ", seed " +
            std::to_string(policy.seed);
  }
  if (policy.recent_bp != 0) {
    text += "; newest " + percent_text(policy.recent_bp) + " % first";
  }
  return text;
}

}  // namespace zipcache::policy
