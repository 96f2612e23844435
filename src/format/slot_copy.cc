#include "format/slot_copy.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/check.h"

namespace zipcache::format {
namespace {

// The part of `runs` that is a class of `to`, slots counted from the first of that class.
std::vector<SourceSlots> runs_of_class(std::span<const Source> sources,
                                       std::span<const SourceSlots> runs, const BlockLayout& to,
                                       Tensor t, int cls) {
  const std::uint32_t begin = to.first_slot(t, cls), end = begin + to.class_tokens(t, cls);
  std::vector<SourceSlots> chosen;
  std::uint32_t at = 0;
  for (const SourceSlots& run : runs) {
    const std::uint32_t from = std::max(at, begin), until = std::min(at + run.n, end);
    if (from < until) {
      const std::uint32_t first = run.first + (from - at);
      const BlockLayout& source = *sources[run.source].layout;
      ZC_CHECK(first >= source.first_slot(t, cls) &&
               first + (until - from) <= source.first_slot(t, cls) + source.class_tokens(t, cls));
      chosen.push_back({run.source, first - source.first_slot(t, cls), until - from});
    }
    at += run.n;
  }
  return chosen;
}

// One matrix of codes.
void copy_codes(std::span<const Source> sources, std::span<const SourceSlots> runs,
                const BlockLayout& to, std::byte* out, Tensor t, std::uint32_t head, int cls,
                std::uint32_t group) {
  const int bits = to.code_bits(t, cls, group);
  const std::size_t channels = to.group_channels(t, group);
  const bool tokens_are_lanes = t == Tensor::kKey;
  const auto lanes = [&](std::size_t n) { return tokens_are_lanes ? n : channels; };
  const auto inner = [&](std::size_t n) { return tokens_are_lanes ? channels : n; };

  std::vector<std::vector<std::uint8_t>> old(sources.size());
  for (std::size_t s = 0; s < sources.size(); ++s) {
    const auto& [layout, block] = sources[s];
    const std::size_t n = layout->class_tokens(t, cls);
    old[s].resize(n * channels);
    unpack_codes(bits, lanes(n), inner(n),
                 {block + layout->codes(t, head, cls, group), layout->codes_size(t, cls, group)},
                 old[s]);
  }
  const std::size_t n_new = to.class_tokens(t, cls);
  std::vector<std::uint8_t> chosen(n_new * channels);
  std::size_t at = 0;
  for (const auto& [source, first, n] : runs) {
    if (tokens_are_lanes) {
      std::memcpy(&chosen[at * channels], &old[source][first * channels], n * channels);
    } else {
      const std::size_t n_old = sources[source].layout->class_tokens(t, cls);
      for (std::size_t channel = 0; channel < channels; ++channel) {
        std::memcpy(&chosen[channel * n_new + at], &old[source][channel * n_old + first], n);
      }
    }
    at += n;
  }
  pack_codes(bits, lanes(n_new), inner(n_new), chosen,
             {out + to.codes(t, head, cls, group), to.codes_size(t, cls, group)});
}

// Two planes, one number per slot in each.
void copy_token_params(std::span<const Source> sources, std::span<const SourceSlots> runs,
                       const BlockLayout& to, std::byte* out, Tensor t, std::uint32_t head,
                       std::uint32_t group) {
  const std::size_t size = to.tensor(t).token_params == TokenParams::kHalf ? sizeof(Half) : 1;
  std::byte* next = out + to.token_scale_min(t, head, group);
  for (const std::size_t plane : {0, 1}) {
    for (const auto& [source, first, n] : runs) {
      const auto& [layout, block] = sources[source];
      std::memcpy(next,
                  block + layout->token_scale_min(t, head, group) +
                      (plane * layout->shape().n_tokens + first) * size,
                  n * size);
      next += n * size;
    }
  }
}

void copy_channel_params(const Source& source, const BlockLayout& to, std::byte* out, Tensor t,
                         std::uint32_t head) {
  const auto& [layout, block] = source;
  const TensorFormat& format = to.tensor(t);
  for (int cls = 0; cls < format.n_classes; ++cls) {
    const std::size_t half_plane = to.head_dim(t) * sizeof(Half);
    if (format.granularity == Granularity::kChannelwise && to.class_tokens(t, cls) > 0) {
      ZC_CHECK(layout->class_tokens(t, cls) > 0);
      std::memcpy(out + to.channel_scale_min(t, head, cls),
                  block + layout->channel_scale_min(t, head, cls), 2 * half_plane);
    } else if (format.granularity == Granularity::kChannelSeparable) {
      std::memcpy(out + to.channel_factor(t, head, cls),
                  block + layout->channel_factor(t, head, cls), half_plane);
    }
  }
  if (format.wide_channels > 0) {
    std::memcpy(out + to.wide_mask(t, head), block + layout->wide_mask(t, head),
                to.head_dim(t) / 8);
  }
  if (format.token_params == TokenParams::kByte) {
    std::memcpy(out + to.token_base(t, head), block + layout->token_base(t, head),
                format.n_classes * sizeof(Half));
  }
}

}  // namespace

bool can_be_taken_apart(const TensorFormat& f) {
  return !f.slot_shared && f.group_tokens == 0 && f.rank == 0 && f.outliers == 0 && !f.reordered &&
         is_code_width(f.bits[0]) && (f.n_classes == 1 || is_code_width(f.bits[1]));
}

bool can_be_taken_apart(const BlockShape& shape) {
  return can_be_taken_apart(shape.key) && can_be_taken_apart(shape.value);
}

void copy_head(std::span<const Source> sources, std::span<const SourceSlots> runs,
               const BlockLayout& to, std::byte* out, std::uint32_t head) {
  ZC_CHECK(std::accumulate(runs.begin(), runs.end(), 0u, [](std::uint32_t n, const auto& run) {
             return n + run.n;
           }) == to.shape().n_tokens);
  for (const Tensor t : kTensors) {
    copy_channel_params(sources.front(), to, out, t, head);
    for (int cls = 0; cls < to.tensor(t).n_classes; ++cls) {
      const std::vector<SourceSlots> of_class = runs_of_class(sources, runs, to, t, cls);
      for (std::uint32_t group = 0; group < to.n_groups(t); ++group) {
        copy_codes(sources, of_class, to, out, t, head, cls, group);
      }
    }
    if (to.tensor(t).granularity != Granularity::kChannelwise) {
      for (std::uint32_t group = 0; group < to.n_groups(t); ++group) {
        copy_token_params(sources, runs, to, out, t, head, group);
      }
    }
  }
}

}  // namespace zipcache::format
