// mikv (arXiv 2402.18096): tokens that H2O would evict are kept at few bits. Important tokens are
// the newest and those of most accumulated attention. All are quantized per token; keys are divided
// by a balancer per channel first, measured on the prompt: b = sqrt(max |q| / max |k|), k b is
// stored, as a channel factor of 1/b. The paper moves tokens from class to class; here the class
// that a token has when it is quantized stays.
#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

constexpr std::array<Named<bool>, 2> kOnOff{{{"on", true}, {"off", false}}};

Policy make(SettingReader& in) {
  Policy policy;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->granularity = format::Granularity::kTokenwise;
    tensor->n_classes = 2;
    tensor->bits = {4, 2};
    tensor->salient_bp = 6000;
  }
  seal_as_published(policy);
  policy.min_ranked_tokens = 0;
  policy.metric = saliency::Metric::kAccumulated;
  policy.probes = saliency::ProbeRule::kAll;
  read_tensor(in, "key", 2, nullptr, policy.key, /*exact_high=*/true);
  read_tensor(in, "value", 2, nullptr, policy.value, /*exact_high=*/true);
  policy.recent_bp = in.percent("recent", policy.key.salient_bp / 2);
  if (in.choice("balancer", kOnOff, true)) {
    policy.key.granularity = format::Granularity::kChannelSeparable;
    policy.key.factors = Factors::kBalanced;
  }
  read_schedule(in, policy);
  return policy;
}

}  // namespace

Method mikv_method() {
  return {"mikv",
          "4 bits for tokens of much accumulated attention and for the newest, 2 for the others, "
          "keys balanced by their queries (MiKV)",
          {"key-bits", "value-bits", "key-salient", "value-salient", "key-clip", "value-clip",
           "recent", "balancer", "sinks", "hold", "seal", "block"},
          make,
          {}};
}

}  // namespace zipcache::policy
