#include "eval/paper_ratio.h"

namespace zipcache::eval {
namespace {

constexpr double kHalfBits = 16;

double mean_code_bits(const policy::TensorPolicy& tensor) {
  const double salient = tensor.n_classes == 2 ? double(tensor.salient_bp) / 10000 : 1.0;
  return salient * tensor.bits[0] + (1 - salient) * tensor.bits[1];
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

double mean_code_bits(const policy::Policy& policy) {
  return policy.seals() ? (mean_code_bits(policy.key) + mean_code_bits(policy.value)) / 2
                        : kHalfBits;
}

}  // namespace zipcache::eval
