// skvq (arXiv 2405.06219): few bits per token and group of channels, where channels are reordered
// so that those of alike ranges share a group; ranges are clipped about zero; the newest tokens and
// the first are exact. Which channels are alike comes from a calibration run. What differs from the
// publication:
// - channels are clustered inside each KV head, in groups of equal size, at most half a head (over
//   all heads there, in clusters of any size: a few outlying channels get a scale of their own);
// - keys have rotary embedding applied (before it there, where channels differ more);
// - scale and minimum of a group are two bytes as there, but not two FP8 numbers: a range always
//   holds 0;
// - one fraction of clipping for all layers (searched layer by layer there);
// - each block holds a copy of the order of its channels (folded into the weights there).
#include <numeric>

#include "policy/channel_clusters.h"
#include "policy/method.h"
#include "policy/shared_settings.h"

namespace zipcache::policy {
namespace {

constexpr std::uint32_t kMaxGroup = 128;
constexpr std::uint32_t kGroupStep = 16;
constexpr std::uint32_t kSinks = 5;
constexpr std::uint32_t kWindow = 128;
constexpr float kClip = 0.96f;

// The largest group that splits every head into two or more, of up to 128 channels.
std::uint32_t usual_group(const Calibration& calibration) {
  std::uint32_t common = 0, smallest = UINT32_MAX;
  for (const LayerCalibration& layer : calibration.layers) {
    for (const std::uint32_t dim : {layer.key_dim, layer.value_dim}) {
      common = std::gcd(common, dim);
      smallest = std::min(smallest, dim);
    }
  }
  std::uint32_t group = kGroupStep;
  for (std::uint32_t size = kGroupStep; size <= std::min(kMaxGroup, smallest / 2);
       size += kGroupStep) {
    group = common % size == 0 ? size : group;
  }
  return group;
}

// Head by head.
std::vector<std::uint16_t> orders(const std::vector<float>& low, const std::vector<float>& high,
                                  std::uint32_t head_dim, std::uint32_t group) {
  std::vector<std::uint16_t> all;
  for (std::size_t head = 0; head < low.size(); head += head_dim) {
    const auto order = cluster_channels(std::span(low).subspan(head, head_dim),
                                        std::span(high).subspan(head, head_dim), group);
    all.insert(all.end(), order.begin(), order.end());
  }
  return all;
}

void take_orders(SettingReader& in, const Calibration& calibration, Policy& policy) {
  if (policy.key.group_channels == 0) {
    policy.key.group_channels = policy.value.group_channels =
        static_cast<std::uint16_t>(usual_group(calibration));
  }
  const std::uint32_t group = policy.key.group_channels;
  for (const LayerCalibration& layer : calibration.layers) {
    if (layer.key_dim % group != 0 || layer.value_dim % group != 0) {
      in.fail("group", std::to_string(group) + " does not split heads of " +
                           std::to_string(layer.key_dim) + " (K) and " +
                           std::to_string(layer.value_dim) + " (V) channels, as layer " +
                           std::to_string(layer.layer) +
                           " of the calibration has them; group 0 is the largest that does");
      return;
    }
    policy.given[layer.layer] = {
        .n_kv_heads = layer.n_kv_heads,
        .key_dim = layer.key_dim,
        .value_dim = layer.value_dim,
        .key_order = orders(layer.key_min, layer.key_max, layer.key_dim, group),
        .value_order = orders(layer.value_min, layer.value_max, layer.value_dim, group)};
  }
}

Policy make(SettingReader& in) {
  Policy policy;
  for (TensorPolicy* tensor : {&policy.key, &policy.value}) {
    tensor->granularity = format::Granularity::kTokenwise;
    tensor->token_params = format::TokenParams::kByte;
    tensor->reordered = true;
    tensor->bits = {2, 2};
    tensor->rules.clip = {kClip, kClip};
    tensor->rules.clip_about_zero = true;
  }
  policy.sink_tokens = kSinks;
  policy.hold_tokens = kWindow;
  read_tensor(in, "key", 1, nullptr, policy.key);
  read_tensor(in, "value", 1, nullptr, policy.value);
  policy.key.group_channels = policy.value.group_channels = static_cast<std::uint16_t>(
      in.count("group", {.min = kGroupStep, .max = 512, .step = kGroupStep, .or_zero = true}, 0));
  read_schedule(in, policy);
  if (const Calibration* calibration = in.calibration()) {
    take_orders(in, *calibration, policy);
  }
  return policy;
}

}  // namespace

Method skvq_method() {
  return {"skvq",
          "one width, per token and group of channels that a calibration file says are alike; "
          "newest tokens exact (SKVQ, clustered inside heads)",
          {"calibration", "key-bits", "value-bits", "key-clip", "value-clip", "group", "sinks",
           "hold", "seal", "block"},
          make,
          {}};
}

}  // namespace zipcache::policy
