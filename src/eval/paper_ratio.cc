#include "eval/paper_ratio.h"

namespace zipcache::eval {
namespace {

constexpr double kHalfBits = 16;

double mean_code_bits(const policy::TensorPolicy& tensor) {
  const double salient = tensor.n_classes == 2 ? double(tensor.salient_bp) / 10000 : 1.0;
  const double wide = double(tensor.wide_bp) / 10000;
  return wide * tensor.wide_bits +
         (1 - wide) * (salient * tensor.bits[0] + (1 - salient) * tensor.bits[1]);
}

// Of K or V alone: half of the elements.
ParamCount tensor_params(const policy::TensorPolicy& tensor) {
  ParamCount params;
  switch (tensor.granularity) {
    case format::Granularity::kChannelwise:
      if (tensor.group_tokens != 0) {
        params.per_element = 1.0 / tensor.group_tokens;
      } else {
        params.per_channel = 2;
      }
      break;
    case format::Granularity::kChannelSeparable:
      params.per_channel = 1;
      [[fallthrough]];
    case format::Granularity::kTokenwise:
      if (tensor.group_channels != 0) {
        params.per_element = 1.0 / tensor.group_channels;
      } else {
        params.per_token = 2;
      }
      break;
  }
  return params;
}

}  // namespace

double formula_ratio(const RatioShape& shape, double bits, const ParamCount& params) {
  const double elements = 2 * shape.batch * shape.channels * shape.tokens;
  const double n_params = params.per_channel * shape.channels +
                          params.per_token * shape.batch * shape.tokens +
                          params.per_element * elements;
  return elements * kHalfBits / (elements * bits + n_params * kHalfBits);
}

double reported_ratio(double tokens, double bits) {
  return formula_ratio({kReportedBatch, kReportedChannels, tokens}, bits, kReported);
}

ParamCount formula_params(const policy::Policy& policy) {
  if (!policy.seals()) {
    return {};
  }
  const ParamCount key = tensor_params(policy.key), value = tensor_params(policy.value);
  return {.per_channel = key.per_channel + value.per_channel,
          .per_token = key.per_token + value.per_token,
          .per_element = key.per_element + value.per_element};
}

double mean_code_bits(const policy::Policy& policy) {
  return policy.seals() ? (mean_code_bits(policy.key) + mean_code_bits(policy.value)) / 2
                        : kHalfBits;
}

}  // namespace zipcache::eval
