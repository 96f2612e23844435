// static (after WKVQuant, arXiv 2402.12065): channel factors come from a calibration run, the scale
// of each token is its own. Keys are divided by sqrt(max |k| / max |q|) (they are multiplied with
// the queries that were seen, as SmoothQuant balances weights), values by sqrt(max |v|). A token is
// exact in the step that brings it. The publication learns its factors, block of layers by block;
// here they are measured. It quantizes each decoded token at once, here they wait for one another
// to make a block, which holds a copy of the factors.
#include <cmath>

#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

constexpr std::uint32_t kSealTokens = 32;

float magnitude(float min, float max) { return std::max(std::abs(min), std::abs(max)); }

LayerChannels channels_of(const LayerCalibration& seen) {
  LayerChannels channels{
      .n_kv_heads = seen.n_kv_heads, .key_dim = seen.key_dim, .value_dim = seen.value_dim};
  for (std::size_t c = 0; c < seen.key_min.size(); ++c) {
    const float factor = std::sqrt(magnitude(seen.key_min[c], seen.key_max[c]) / seen.query_max[c]);
    channels.key_factors.push_back(factor > 0 && std::isfinite(factor) ? factor : 1.0f);
  }
  for (std::size_t c = 0; c < seen.value_min.size(); ++c) {
    channels.value_factors.push_back(std::sqrt(magnitude(seen.value_min[c], seen.value_max[c])));
  }
  return channels;
}

Policy make(SettingReader& in) {
  Policy policy;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->granularity = format::Granularity::kChannelSeparable;
    tensor->factors = Factors::kGiven;
    tensor->bits = {4, 4};
  }
  seal_as_published(policy);
  policy.seal_tokens = kSealTokens;
  policy.min_ranked_tokens = 0;
  read_tensor(in, "key", 1, nullptr, policy.key);
  read_tensor(in, "value", 1, nullptr, policy.value);
  read_schedule(in, policy);
  if (const Calibration* calibration = in.calibration()) {
    for (const LayerCalibration& layer : calibration->layers) {
      policy.given[layer.layer] = channels_of(layer);
    }
  }
  return policy;
}

}  // namespace

Method static_method() {
  return {"static",
          "one width, channel factors from a calibration file instead of the tokens, keys balanced "
          "by their queries (static, after WKVQuant)",
          {"calibration", "key-bits", "value-bits", "key-clip", "value-clip", "sinks", "hold",
           "seal", "block"},
          make,
          {}};
}

}  // namespace zipcache::policy
