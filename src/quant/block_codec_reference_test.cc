// Every code and parameter of an encoded block against the formulas in double (ref/quant_ref.h),
// given the rounding of the parameters; and the decoded values against code and parameter.

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "base/half.h"
#include "quant/codec_test_util.h"
#include "ref/quant_ref.h"

namespace zipcache::quant {
namespace {

// Whether `stored` is `exact` rounded to fp16 and saturated. Float arithmetic before the rounding
// may be off by `slack`.
::testing::AssertionResult is_rounded(double stored, double exact, double slack) {
  const double clamped = std::clamp(exact, -65504.0, 65504.0);
  const double ulp =
      std::ldexp(1.0, std::max(std::ilogb(clamped == 0 ? 1e-30 : clamped), -14) - 10);
  if (std::abs(stored - clamped) <= ulp / 2 + slack) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << stored << " is not " << exact << " rounded to fp16";
}

bool is_near_tie(double steps) {
  return std::abs(steps - std::floor(steps) - 0.5) < 1e-5 * (1 + std::abs(steps));
}

class Checker {
 public:
  Checker(const CodecCase& c, bool on_grid)
      : case_(c), encoded_(c), layout_(encoded_.layout()), on_grid_(on_grid) {}

  void check() {
    for (const Tensor t : kTensors) {
      decoded_ = encoded_.decoded(t);
      for (std::uint32_t head = 0; head < layout_.shape().n_kv_heads; ++head) {
        load(t, head);
        for (int cls = 0; cls < layout_.tensor(t).n_classes; ++cls) {
          if (!layout_.has_codes(t, cls)) {
            check_without_codes(t, head, cls);
            continue;
          }
          codes_ = encoded_.codes(t, head, cls);
          if (layout_.tensor(t).granularity == Granularity::kChannelwise) {
            check_channelwise(t, head, cls);
          } else {
            check_tokenwise(t, head, cls);
          }
        }
      }
    }
  }

 private:
  // rows_[slot][channel] of a head in double, divided by the stored (rounded) channel factors.
  void load(Tensor t, std::uint32_t head) {
    order_ = order_of(case_, head);
    rows_ = head_rows(t, head);
    factors_.assign(rows_.size(), 1.0);
    if (layout_.tensor(t).granularity == Granularity::kChannelSeparable &&
        layout_.param_slots(t) > 0) {
      if (!layout_.tensor(t).class_factors) {
        load_factors(t, head, 0, layout_.first_param_slot(t), layout_.param_slots(t));
      } else {
        for (int cls = 0; cls < layout_.tensor(t).n_classes; ++cls) {
          load_factors(t, head, cls, layout_.first_slot(t, cls), layout_.class_tokens(t, cls));
        }
      }
    }
    for (std::size_t at = 0; at < rows_.size(); ++at) {
      rows_[at] /= factors_[at];
    }
  }

  // Checks the stored factors of a set of slots and spreads them over the slots' rows.
  void load_factors(Tensor t, std::uint32_t head, int cls, std::size_t first, std::size_t n) {
    const std::size_t dim = layout_.head_dim(t);
    auto exact = ref::channel_factors(std::span(rows_).subspan(first * dim, n * dim), n, dim);
    for (std::size_t c = 0; layout_.tensor(t).given_factors && c < dim; ++c) {
      exact[c] = case_.tensor_rules(t).given_factors[head * dim + channel(t, head, c)];
    }
    for (std::size_t c = 0; c < dim; ++c) {
      const double factor = encoded_.value(layout_.channel_factor(t, head, cls), c);
      EXPECT_TRUE(is_rounded(factor, exact[c], 1e-6 * exact[c])) << "factor " << c;
      for (std::size_t slot = first; slot < first + n; ++slot) {
        factors_[slot * dim + c] = factor;
      }
    }
  }

  std::vector<double> head_rows(Tensor t, std::uint32_t head) const {
    const std::size_t dim = layout_.head_dim(t), n_heads = layout_.shape().n_kv_heads;
    std::vector<double> rows;
    for (const std::uint32_t token : order_of(case_, head)) {
      const float* x = &case_.input(t)[(token * n_heads + head) * dim];
      for (std::size_t c = 0; c < dim; ++c) {
        rows.push_back(x[channel(t, head, c)]);
      }
    }
    return rows;
  }

  // The channel that stands at a stored place.
  std::size_t channel(Tensor t, std::uint32_t head, std::size_t place) const {
    if (layout_.tensor(t).wide_channels > 0) {
      return wide_order(head)[place];
    }
    return layout_.tensor(t).reordered
               ? case_.tensor_rules(t).channel_order[head * layout_.head_dim(t) + place]
               : place;
  }

  // Key channels of a head: those of largest weight * range^2, then the others, each ascending.
  std::vector<std::size_t> wide_order(std::uint32_t head) const {
    const std::size_t dim = layout_.shape().key_dim, n_heads = layout_.shape().n_kv_heads;
    std::vector<double> error(dim);
    std::vector<std::size_t> order(dim);
    for (std::size_t c = 0; c < dim; ++c) {
      std::vector<double> set;
      for (std::size_t token = 0; token < layout_.shape().n_tokens; ++token) {
        set.push_back(case_.keys[(token * n_heads + head) * dim + c]);
      }
      const auto range = ref::shrunk_range(set, 1.0);
      error[c] = case_.rules.key.channel_weights[head * dim + c] * (range[1] - range[0]) *
                 (range[1] - range[0]);
      order[c] = c;
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](auto a, auto b) { return error[a] > error[b]; });
    const auto border = order.begin() + layout_.shape().key.wide_channels;
    std::sort(order.begin(), border);
    std::sort(border, order.end());
    return order;
  }

  bool is_wide(Tensor t, std::size_t place) const {
    return place < layout_.tensor(t).wide_channels;
  }
  int bits_of(Tensor t, int cls, std::size_t place) const {
    return is_wide(t, place) ? layout_.tensor(t).wide_bits : layout_.tensor(t).bits[cls];
  }
  double clip_of(Tensor t, int cls, std::size_t place) const {
    const TensorRules& rules = case_.tensor_rules(t);
    return is_wide(t, place) ? rules.wide_clip : rules.clip[cls];
  }

  float& decoded(Tensor t, std::uint32_t head, std::size_t slot, std::size_t place) {
    const std::size_t row = order_[slot] * std::size_t{layout_.shape().n_kv_heads} + head;
    return decoded_[row * layout_.head_dim(t) + channel(t, head, place)];
  }

  // fp16 values, or nothing.
  void check_without_codes(Tensor t, std::uint32_t head, int cls) {
    const std::size_t dim = layout_.head_dim(t), first = layout_.first_slot(t, cls);
    for (std::size_t slot = first; slot < first + layout_.class_tokens(t, cls); ++slot) {
      for (std::size_t c = 0; c < dim; ++c) {
        const float x = static_cast<float>(rows_[slot * dim + c]);
        ASSERT_EQ(decoded(t, head, slot, c),
                  layout_.tensor(t).bits[cls] == format::kExactBits ? round_to_half(x) : 0.0f);
      }
    }
  }

  ref::QuantParams exact_params(const std::vector<double>& set, Tensor t, int cls,
                                std::size_t place) const {
    const double fraction = clip_of(t, cls, place);
    return ref::float_min_params(case_.tensor_rules(t).clip_about_zero
                                     ? ref::scaled_range(set, fraction)
                                     : ref::shrunk_range(set, fraction),
                                 bits_of(t, cls, place));
  }

  // Checks fp16 parameters of a set and returns those that codes follow from.
  ref::QuantParams check_half_params(const std::vector<double>& set, Tensor t, int cls,
                                     std::size_t place, double scale, double min) const {
    const ref::QuantParams exact = exact_params(set, t, cls, place);
    const double span = std::abs(exact.min) + exact.scale * 256;
    EXPECT_TRUE(is_rounded(scale, exact.scale, 1e-6 * span));
    const bool empty_range =
        std::all_of(set.begin(), set.end(), [&](double x) { return x == set[0]; });
    if (case_.tensor_rules(t).rounding == Rounding::kFloatMin || empty_range) {
      EXPECT_TRUE(is_rounded(min, exact.min, 1e-6 * span));
      return {scale, min};
    }
    const double zero_point = -std::nearbyint(exact.min / scale);
    EXPECT_TRUE(is_rounded(min, -zero_point * scale, 1e-6 * span) ||
                is_near_tie(exact.min / scale));
    return {scale, -zero_point * scale};
  }

  void check_code(double x, const ref::QuantParams& params, Tensor t, int cls, std::size_t place,
                  int code) const {
    const int bits = bits_of(t, cls, place);
    const TensorRules& rules = case_.tensor_rules(t);
    const bool integer = layout_.tensor(t).token_params == TokenParams::kHalf &&
                         rules.rounding == Rounding::kIntegerOffset;
    const double steps = (integer ? x : x - params.min) / params.scale;
    const int want =
        integer ? ref::integer_offset_code(x, params, bits) : ref::float_min_code(x, params, bits);
    const bool is_exact = on_grid_ && bits <= 4 && !integer && clip_of(t, cls, place) == 1 &&
                          layout_.tensor(t).granularity != Granularity::kChannelSeparable &&
                          layout_.tensor(t).token_params == TokenParams::kHalf;
    if (is_exact || !is_near_tie(steps)) {
      ASSERT_EQ(code, want) << "x " << x << " scale " << params.scale << " min " << params.min;
    } else {
      ASSERT_NEAR(code, want, 1);
    }
  }

  // The decoded element is what (code, stored scale and min, factor) say, in float.
  void check_decoded(Tensor t, std::uint32_t head, std::size_t slot, std::size_t c, int code,
                     double scale, double min) {
    const float inner = static_cast<float>(scale) * static_cast<float>(code);
    const float sum = inner + static_cast<float>(min);
    ASSERT_EQ(decoded(t, head, slot, c),
              static_cast<float>(factors_[slot * layout_.head_dim(t) + c]) * sum);
  }

  void check_channelwise(Tensor t, std::uint32_t head, int cls) {
    const std::size_t dim = layout_.head_dim(t), first = layout_.first_slot(t, cls);
    const std::size_t n = layout_.class_tokens(t, cls);
    const std::size_t step = layout_.tensor(t).group_tokens == 0 ? std::max<std::size_t>(n, 1)
                                                                 : layout_.tensor(t).group_tokens;
    for (std::size_t begin = 0; begin < n; begin += step) {
      const std::size_t end = std::min(begin + step, n);
      const std::size_t params =
          layout_.channel_scale_min(t, head, cls, static_cast<std::uint32_t>(begin / step));
      for (std::size_t c = 0; c < dim; ++c) {
        std::vector<double> set;
        for (std::size_t slot = begin; slot < end; ++slot) {
          set.push_back(rows_[(first + slot) * dim + c]);
        }
        const double scale = encoded_.value(params, c), min = encoded_.value(params, dim + c);
        const ref::QuantParams used = check_half_params(set, t, cls, c, scale, min);
        for (std::size_t slot = begin; slot < end; ++slot) {
          check_code(set[slot - begin], used, t, cls, c, codes_[slot * dim + c]);
          check_decoded(t, head, first + slot, c, codes_[slot * dim + c], scale, min);
        }
      }
    }
  }

  void check_tokenwise(Tensor t, std::uint32_t head, int cls) {
    const std::size_t dim = layout_.head_dim(t), width = layout_.group_channels(t);
    const std::size_t first = layout_.first_slot(t, cls);
    check_base(t, head, cls);
    for (std::size_t slot = first; slot < first + layout_.class_tokens(t, cls); ++slot) {
      for (std::uint32_t group = 0; group < layout_.n_groups(t); ++group) {
        double scale, min;
        const ref::QuantParams used = check_token_params(t, head, cls, group, slot, &scale, &min);
        for (std::size_t c = group * width; c < (group + 1) * width; ++c) {
          const int code = codes_[(slot - first) * dim + c];
          check_code(rows_[slot * dim + c], used, t, cls, c, code);
          check_decoded(t, head, slot, c, code, scale, min);
        }
      }
    }
  }

  std::vector<double> token_set(Tensor t, std::uint32_t group, std::size_t slot) const {
    const std::size_t dim = layout_.head_dim(t), width = layout_.group_channels(t);
    if (!layout_.tensor(t).slot_shared) {
      const auto begin = rows_.begin() + static_cast<std::ptrdiff_t>(slot * dim + group * width);
      return {begin, begin + static_cast<std::ptrdiff_t>(width)};
    }
    std::vector<double> set;  // slot j of every head, over that head's own factors
    for (std::uint32_t other = 0; other < layout_.shape().n_kv_heads; ++other) {
      const std::vector<double> rows = head_rows(t, other);
      for (std::size_t c = 0; c < dim; ++c) {
        const bool separable = layout_.tensor(t).granularity == Granularity::kChannelSeparable;
        const int cls = slot < layout_.class_tokens(t, 0) ? 0 : 1;
        const double factor =
            separable ? encoded_.value(layout_.channel_factor(t, other, cls), c) : 1.0;
        set.push_back(rows[slot * dim + c] / factor);
      }
    }
    return set;
  }

  ref::QuantParams check_token_params(Tensor t, std::uint32_t head, int cls, std::uint32_t group,
                                      std::size_t slot, double* scale, double* min) const {
    const std::size_t stored = layout_.token_scale_min(t, head, group);
    const std::size_t n_slots = layout_.param_slots(t), at = slot - layout_.first_param_slot(t);
    const std::vector<double> set = token_set(t, group, slot);
    if (layout_.tensor(t).token_params == TokenParams::kHalf) {
      *scale = encoded_.value(stored, at);
      *min = encoded_.value(stored, n_slots + at);
      return check_half_params(set, t, cls, /*place=*/0, *scale, *min);
    }
    const double levels = (1 << layout_.tensor(t).bits[cls]) - 1;
    const auto range = zero_range(set, t, cls);
    const double base = encoded_.value(layout_.token_base(t, head), cls);
    const auto scale_of = [&](int e) {
      return base * (1 + (e & 15) / 16.0) * std::ldexp(1.0, (e >> 4) - 15);
    };
    *scale = scale_of(encoded_.byte(stored, at));
    const double exact = (range[1] - range[0]) / levels;
    for (int e = 0; e < 256; ++e) {
      EXPECT_LE(std::abs(*scale - exact), std::abs(scale_of(e) - exact) + 1e-6 * exact);
    }
    const int z = encoded_.byte(stored, n_slots + at);
    EXPECT_LE(std::abs(z - std::clamp(-range[0] / *scale * 255 / levels, 0.0, 255.0)), 0.5001);
    *min = format::byte_min(static_cast<float>(*scale), static_cast<std::uint8_t>(z),
                            layout_.tensor(t).bits[cls]);
    EXPECT_NEAR(*min, -*scale * z * levels / 255, 1e-6 * *scale * levels);
    return {*scale, *min};
  }

  // Clipped, then extended to hold 0.
  std::vector<double> zero_range(const std::vector<double>& set, Tensor t, int cls) const {
    const TensorRules& rules = case_.tensor_rules(t);
    const auto range = rules.clip_about_zero ? ref::scaled_range(set, rules.clip[cls])
                                             : ref::shrunk_range(set, rules.clip[cls]);
    return {std::min(range[0], 0.0), std::max(range[1], 0.0)};
  }

  void check_base(Tensor t, std::uint32_t head, int cls) const {
    const TensorFormat& f = layout_.tensor(t);
    if (f.token_params != TokenParams::kByte || layout_.class_tokens(t, cls) == 0) {
      return;
    }
    double widest = 0;
    const std::size_t first = layout_.first_slot(t, cls);
    for (std::size_t slot = first; slot < first + layout_.class_tokens(t, cls); ++slot) {
      for (std::uint32_t group = 0; group < layout_.n_groups(t); ++group) {
        const auto range = zero_range(token_set(t, group, slot), t, cls);
        widest = std::max(widest, range[1] - range[0]);
      }
    }
    const double levels = (1 << f.bits[cls]) - 1;
    EXPECT_TRUE(is_rounded(encoded_.value(layout_.token_base(t, head), cls),
                           widest / levels * 16 / 31, 1e-6 * widest));
  }

  const CodecCase& case_;
  const Encoded encoded_;
  const BlockLayout& layout_;
  const bool on_grid_;
  std::vector<std::uint32_t> order_;
  std::vector<double> rows_, factors_;
  std::vector<float> decoded_;
  std::vector<std::uint8_t> codes_;
};

struct Variant {
  std::string name;
  TensorFormat key, value;
  QuantRules rules;
};

TensorFormat two_classes(Granularity granularity, std::uint8_t high, std::uint8_t low) {
  TensorFormat f;
  f.granularity = granularity;
  f.n_classes = 2;
  f.bits = {high, low};
  return f;
}

std::vector<Variant> variants() {
  const auto channelwise = two_classes(Granularity::kChannelwise, 4, 3);
  const auto separable = two_classes(Granularity::kChannelSeparable, 3, 2);
  const auto tokenwise = two_classes(Granularity::kTokenwise, 4, 2);
  const auto with = [](TensorFormat f, auto change) {
    change(f);
    return f;
  };
  const auto bytes = [](TensorFormat& f) { f.token_params = TokenParams::kByte; };
  const auto groups = [](TensorFormat& f) { f.group_channels = 16; };
  const auto slots = [](TensorFormat& f) { f.slot_shared = true; };
  const auto factors = [](TensorFormat& f) { f.class_factors = true; };
  const auto one_class = [](TensorFormat& f) { f.n_classes = 1; };
  const auto token_groups = [](TensorFormat& f) { f.group_tokens = 16; };
  const auto given = [](TensorFormat& f) { f.given_factors = true; };
  const auto reordered = [](TensorFormat& f) { f.reordered = true; };
  const auto wide_channels = [](TensorFormat& f) { f.wide_channels = 16; };
  const auto high_exact = [](TensorFormat& f) { f.bits[0] = format::kExactBits; };
  const auto low_evicted = [](TensorFormat& f) { f.bits[1] = format::kEvictedBits; };
  QuantRules clipped;
  clipped.key.clip = {0.9f, 0.7f};
  clipped.value.clip = {1.0f, 0.75f};
  QuantRules wide_clipped = clipped;
  wide_clipped.key.wide_clip = 0.95f;
  QuantRules about_zero = clipped;
  about_zero.key.clip_about_zero = about_zero.value.clip_about_zero = true;
  QuantRules integer;
  integer.key.rounding = integer.value.rounding = Rounding::kIntegerOffset;
  const auto wide = two_classes(Granularity::kChannelwise, 8, 2);
  const auto wide_bytes = with(two_classes(Granularity::kChannelSeparable, 8, 4), bytes);
  return {
      {"default", channelwise, with(separable, bytes), {}},
      {"default_clipped", channelwise, with(separable, bytes), clipped},
      {"half", channelwise, separable, clipped},
      {"official", channelwise, with(separable, slots), {}},
      {"official_clipped", channelwise, with(separable, slots), clipped},
      {"paper", channelwise, with(with(separable, factors), slots), integer},
      {"class_factors", channelwise, with(with(separable, factors), bytes), clipped},
      {"paper_clipped", two_classes(Granularity::kChannelwise, 4, 2), tokenwise, integer},
      {"uniform", with(channelwise, one_class), with(separable, one_class), {}},
      {"tokenwise", tokenwise, tokenwise, {}},
      {"tokenwise_bytes", with(tokenwise, bytes), with(tokenwise, bytes), clipped},
      {"groupwise", with(tokenwise, groups), with(tokenwise, groups), clipped},
      {"groupwise_separable_bytes",
       with(with(separable, groups), bytes),
       with(with(separable, groups), bytes),
       {}},
      {"swapped", separable, channelwise, clipped},
      {"tokenwise_slots", with(tokenwise, slots), with(tokenwise, slots), integer},
      {"wide", wide, wide_bytes, clipped},
      {"kivi",
       with(with(channelwise, one_class), token_groups),
       with(with(tokenwise, groups), one_class),
       {}},
      {"kivi_held_values",
       with(with(channelwise, one_class), token_groups),
       with(with(tokenwise, high_exact), one_class),
       {}},
      {"token_groups", with(channelwise, token_groups), separable, clipped},
      {"exact_high", with(channelwise, high_exact), with(with(separable, bytes), high_exact), {}},
      {"exact_tokenwise",
       with(with(tokenwise, groups), high_exact),
       with(tokenwise, high_exact),
       {}},
      {"evicting",
       with(with(channelwise, high_exact), low_evicted),
       with(with(tokenwise, high_exact), low_evicted),
       {}},
      {"evicting_codes",
       with(with(tokenwise, bytes), low_evicted),
       with(separable, low_evicted),
       {}},
      {"given_factors", with(with(separable, given), one_class), with(separable, given), clipped},
      {"reordered", with(with(tokenwise, groups), reordered),
       with(with(with(separable, given), reordered), bytes), about_zero},
      {"static", with(with(separable, given), one_class), with(with(separable, given), one_class),
       clipped},
      {"skvq", with(with(with(with(tokenwise, groups), reordered), bytes), one_class),
       with(with(with(with(tokenwise, groups), reordered), bytes), one_class), about_zero},
      {"wide_channels", with(two_classes(Granularity::kChannelwise, 3, 2), wide_channels),
       with(separable, bytes), wide_clipped},
      {"wide_channels_of_all_tokens",
       with(with(with(two_classes(Granularity::kChannelwise, 2, 2), wide_channels), one_class),
            token_groups),
       tokenwise,
       {}},
  };
}

class BlockCodecReference : public ::testing::TestWithParam<Variant> {};

TEST_P(BlockCodecReference, CodesParamsAndValues) {
  struct Size {
    std::uint32_t n_tokens, n_heads, key_dim, value_dim, key_salient, value_salient;
  };
  std::uint64_t seed = 1;
  for (const Size& size :
       {Size{1, 1, 16, 16, 0, 1}, Size{2, 3, 32, 16, 1, 0}, Size{17, 2, 16, 48, 17, 5},
        Size{33, 1, 64, 32, 16, 16}, Size{70, 2, 32, 32, 20, 35}}) {
    BlockShape shape{size.n_tokens,  size.n_heads,   size.key_dim,
                     size.value_dim, GetParam().key, GetParam().value};
    shape.key.class0_tokens = size.key_salient;
    shape.value.class0_tokens = size.value_salient;
    if (shape.key.bits[1] == format::kEvictedBits) {
      shape.value.class0_tokens = size.key_salient;  // evicted in both
    }
    if (shape.key.wide_channels >= shape.key_dim) {
      shape.key.wide_channels = 0;
    }
    for (const bool on_grid : {true, false}) {
      SCOPED_TRACE(::testing::Message() << size.n_tokens << " tokens, on grid " << on_grid);
      Checker(make_case(shape, GetParam().rules, on_grid, ++seed), on_grid).check();
      if (HasFailure()) {
        return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Variants, BlockCodecReference, ::testing::ValuesIn(variants()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace zipcache::quant
