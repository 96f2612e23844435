// Compression ratios as the paper reckons them (appendix A): FP16 bytes over those of the codes and
// of FP16 parameters. No masks, no exact window, channel parameters shared over the batch; what a
// cache really holds is eval/layer_bytes.h.
#pragma once

#include "policy/policy.h"

namespace zipcache::eval {

// K and V of `batch` sequences; `channels` = KV heads * head_dim.
struct RatioShape {
  double batch = 1;
  double channels = 0;
  double tokens = 0;
};

// How many parameters K and V need together.
struct ParamCount {
  double per_channel = 0;
  double per_token = 0;    // of each sequence
  double per_element = 0;  // of K or V
};

inline constexpr ParamCount kTokenwise{.per_token = 4};
inline constexpr ParamCount kChannelwiseTokenwise{.per_channel = 2, .per_token = 2};
inline constexpr ParamCount kChannelwiseCst{.per_channel = 3,
                                            .per_token = 2};  // the paper's method
constexpr ParamCount groupwise(double group_channels) {
  return {.per_element = 2 / group_channels};
}

// Not in the text: the only count in whole numbers that gives the four ratios which the paper
// prints for mixed precision (4.98, 4.94, 4.39, 4.43), at the batch and channels below.
inline constexpr ParamCount kReported{.per_channel = 4, .per_token = 4};
inline constexpr double kReportedBatch = 8;
inline constexpr double kReportedChannels = 4096;

double formula_ratio(const RatioShape& shape, double bits, const ParamCount& params);
double reported_ratio(double tokens, double bits);

// How many parameters the formula gives a policy: what its granularities take, each once for all
// classes and a token's (scale, min) once for all heads, as the paper counts. kChannelwiseCst for
// the paper's own method; none where nothing is sealed.
ParamCount formula_params(const policy::Policy& policy);

// Bits of a code, averaged over K, V and the classes; 16 under policies that seal nothing.
double mean_code_bits(const policy::Policy& policy);

}  // namespace zipcache::eval
