#include "ref/quant_ref.h"

#include <algorithm>
#include <cmath>

namespace zipcache::ref {
namespace {

double levels(int bits) { return std::pow(2.0, bits) - 1; }

double round_half_even(double x) { return std::nearbyint(x); }  // the default rounding mode

double scale_of(std::span<const double> set, int bits) {
  const auto [low, high] = std::minmax_element(set.begin(), set.end());
  const double scale = (*high - *low) / levels(bits);
  return scale == 0 ? 1 : scale;
}

std::vector<double> column(std::span<const double> x, std::size_t columns, std::size_t c) {
  std::vector<double> out;
  for (std::size_t at = c; at < x.size(); at += columns) {
    out.push_back(x[at]);
  }
  return out;
}

Quantized blank(std::size_t size) {
  Quantized out;
  out.codes.resize(size);
  out.values.resize(size);
  return out;
}

template <typename ParamsOf, typename CodeOf>
Quantized quantize_columns(std::span<const double> x, std::size_t columns, int bits,
                           ParamsOf params_of, CodeOf code_of) {
  Quantized out = blank(x.size());
  for (std::size_t c = 0; c < columns; ++c) {
    const QuantParams params = params_of(column(x, columns, c), bits);
    out.params.push_back(params);
    for (std::size_t at = c; at < x.size(); at += columns) {
      out.codes[at] = code_of(x[at], params, bits);
      out.values[at] = params.scale * out.codes[at] + params.min;
    }
  }
  return out;
}

}  // namespace

QuantParams float_min_params(std::span<const double> set, int bits) {
  return {scale_of(set, bits), *std::min_element(set.begin(), set.end())};
}

int float_min_code(double x, const QuantParams& params, int bits) {
  const double steps = round_half_even((x - params.min) / params.scale);
  return static_cast<int>(std::clamp(steps, 0.0, levels(bits)));
}

QuantParams integer_offset_params(std::span<const double> set, int bits) {
  const double scale = scale_of(set, bits);
  const double min = *std::min_element(set.begin(), set.end());
  return {scale, round_half_even(min / scale) * scale};
}

int integer_offset_code(double x, const QuantParams& params, int bits) {
  const double zero_point = -round_half_even(params.min / params.scale);
  const double steps = round_half_even(x / params.scale) + zero_point;
  return static_cast<int>(std::clamp(steps, 0.0, levels(bits)));
}

QuantParams widened_params(const QuantParams& old, std::span<const double> range, int bits) {
  const double width = old.scale * levels(bits);
  double low = old.min, high = old.min + width;
  if (range[0] < old.min - old.scale) {
    low = range[0] - width / 10;
  }
  if (range[1] > old.min + width + old.scale) {
    high = range[1] + width / 10;
  }
  return {(high - low) / levels(bits), low};
}

std::vector<double> shrunk_range(std::span<const double> set, double fraction) {
  const auto [low, high] = std::minmax_element(set.begin(), set.end());
  const double centre = (*low + *high) / 2;
  const double half_width = (*high - *low) / 2 * fraction;
  return {centre - half_width, centre + half_width};
}

std::vector<double> scaled_range(std::span<const double> set, double fraction) {
  const auto [low, high] = std::minmax_element(set.begin(), set.end());
  return {*low * fraction, *high * fraction};
}

Quantized channelwise(std::span<const double> x, std::size_t /*rows*/, std::size_t columns,
                      int bits) {
  return quantize_columns(x, columns, bits, float_min_params, float_min_code);
}

Quantized channelwise_integer_offset(std::span<const double> x, std::size_t /*rows*/,
                                     std::size_t columns, int bits) {
  return quantize_columns(x, columns, bits, integer_offset_params, integer_offset_code);
}

Quantized groupwise(std::span<const double> x, std::size_t rows, std::size_t columns,
                    std::size_t group, int bits) {
  Quantized out = blank(x.size());
  for (std::size_t begin = 0; begin < rows * columns; begin += group) {
    const QuantParams params = float_min_params(x.subspan(begin, group), bits);
    out.params.push_back(params);
    for (std::size_t at = begin; at < begin + group; ++at) {
      out.codes[at] = float_min_code(x[at], params, bits);
      out.values[at] = params.scale * out.codes[at] + params.min;
    }
  }
  return out;
}

Quantized tokenwise(std::span<const double> x, std::size_t rows, std::size_t columns, int bits) {
  return groupwise(x, rows, columns, columns, bits);
}

Quantized byte_rows(std::span<const double> x, std::size_t rows, std::size_t columns) {
  Quantized out = blank(x.size());
  for (std::size_t row = 0; row < rows; ++row) {
    double largest = 0;
    for (const double value : x.subspan(row * columns, columns)) {
      largest = std::max(largest, std::abs(value));
    }
    // fp16 steps: 2^-24 below 2^-14, else 2^-10 of the power of two below.
    const double least = largest / 127;
    const double step =
        std::pow(2.0, least < std::pow(2.0, -14) ? -24 : std::floor(std::log2(least)) - 10);
    const double scale = std::ceil(least / step) * step;
    out.params.push_back({scale, -128 * scale});
    for (std::size_t c = 0; c < columns; ++c) {
      const std::size_t at = row * columns + c;
      out.codes[at] = 128 + static_cast<int>(scale == 0 ? 0 : round_half_even(x[at] / scale));
      out.values[at] = scale * (out.codes[at] - 128);
    }
  }
  return out;
}

std::vector<double> channel_factors(std::span<const double> x, std::size_t /*rows*/,
                                    std::size_t columns) {
  std::vector<double> factors;
  for (std::size_t c = 0; c < columns; ++c) {
    double largest = 0;
    for (const double value : column(x, columns, c)) {
      largest = std::max(largest, std::abs(value));
    }
    factors.push_back(largest == 0 ? 1 : std::sqrt(largest));
  }
  return factors;
}

Quantized channel_separable(std::span<const double> x, std::size_t rows, std::size_t columns,
                            int bits) {
  const std::vector<double> factors = channel_factors(x, rows, columns);
  std::vector<double> normalised(x.begin(), x.end());
  for (std::size_t at = 0; at < normalised.size(); ++at) {
    normalised[at] /= factors[at % columns];
  }
  Quantized out = tokenwise(normalised, rows, columns, bits);
  out.factors = factors;
  for (std::size_t at = 0; at < out.values.size(); ++at) {
    out.values[at] *= factors[at % columns];
  }
  return out;
}

}  // namespace zipcache::ref
