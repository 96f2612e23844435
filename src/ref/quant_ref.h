// The quantizers of the paper (section 4) as formulas, in double and with unrounded parameters: the
// truth that the block codec is tested against. All matrices are row-major [rows = tokens][columns
// = channels]. No guards beyond those of the definition, no clipping of ranges unless named.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace zipcache::ref {

// x^ = scale * code + min.
struct QuantParams {
  double scale = 1;
  double min = 0;
};

struct Quantized {
  std::vector<int> codes;           // [rows][columns]
  std::vector<QuantParams> params;  // one per set that shares them
  std::vector<double> factors;      // channel-separable: one per column; otherwise empty
  std::vector<double> values;       // what the codes stand for, [rows][columns]
};

// s = (max - min) / (2^bits - 1), 1 for an empty range.
QuantParams float_min_params(std::span<const double> set, int bits);
// clamp(round((x - min) / s), 0, 2^bits - 1), half to even.
int float_min_code(double x, const QuantParams& params, int bits);

// Eq. 5 with the zero point z = -round(min / s) kept an integer; min is -z * s.
QuantParams integer_offset_params(std::span<const double> set, int bits);
// clamp(round(x / s) + z, 0, 2^bits - 1).
int integer_offset_code(double x, const QuantParams& params, int bits);

// A grid widened for values from range[0] to range[1]: an end that these pass by more than a
// step moves to where they end, and a tenth of the old range further.
QuantParams widened_params(const QuantParams& old, std::span<const double> range, int bits);

// The range [low, high] of a set shrunk about its centre to `fraction` of its width.
std::vector<double> shrunk_range(std::span<const double> set, double fraction);

// The range of a set with both ends multiplied by `fraction` (SKVQ's clipping).
std::vector<double> scaled_range(std::span<const double> set, double fraction);

// One (scale, min) per channel, over all tokens; params[column].
Quantized channelwise(std::span<const double> x, std::size_t rows, std::size_t columns, int bits);
Quantized channelwise_integer_offset(std::span<const double> x, std::size_t rows,
                                     std::size_t columns, int bits);

// One (scale, min) per `group` neighbouring channels of a token; params[row * columns/group + g].
Quantized groupwise(std::span<const double> x, std::size_t rows, std::size_t columns,
                    std::size_t group, int bits);

// One (scale, min) per token over all channels; params[row].
Quantized tokenwise(std::span<const double> x, std::size_t rows, std::size_t columns, int bits);

// Rows in 8 bits: scale = max |x| / 127 rounded up to fp16, min = -128 * scale; params[row].
Quantized byte_rows(std::span<const double> x, std::size_t rows, std::size_t columns);

// sqrt(max_t |x_tc|), 1 for a channel of zeros.
std::vector<double> channel_factors(std::span<const double> x, std::size_t rows,
                                    std::size_t columns);

// Channel-separable tokenwise (Eq. 6, Algorithm 1): tokenwise on x / factor, times factor.
Quantized channel_separable(std::span<const double> x, std::size_t rows, std::size_t columns,
                            int bits);

}  // namespace zipcache::ref
