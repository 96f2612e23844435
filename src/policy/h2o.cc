// h2o (arXiv 2306.14048): of each layer and KV head the newest tokens and those of most accumulated
// attention are kept, exact; the others are evicted with their scores. Shares are of the tokens of
// the sequence so far. A reference implementation: the kept tokens are repacked at each eviction.
#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

Policy make(SettingReader& in) {
  Policy policy;
  policy.evicts = true;
  policy.metric = saliency::Metric::kAccumulated;
  policy.probes = saliency::ProbeRule::kAll;
  policy.key.granularity = policy.value.granularity = format::Granularity::kTokenwise;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->n_classes = 2;
    tensor->bits = {format::kExactBits, format::kEvictedBits};
  }
  policy.sink_tokens = 0;
  policy.hold_tokens = 1;
  policy.block_tokens = 0;
  policy.seal_multiple = 1;
  policy.key.salient_bp = policy.value.salient_bp = in.percent("heavy", 1000);
  policy.hold_bp = in.percent("recent", 1000);
  policy.seal_tokens = in.count("seal", {.min = 1, .max = 65536}, 16);
  return policy;
}

}  // namespace

Method h2o_method() {
  return {
      "h2o",
      "keeps the newest tokens and those of most accumulated attention, evicts the others (H2O; "
      "reference implementation)",
      {"heavy", "recent", "seal"},
      make,
      {}};
}

}  // namespace zipcache::policy
