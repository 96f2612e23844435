#include "quant/corrections.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "base/half.h"
#include "format/block_params.h"
#include "quant/grid.h"
#include "quant/low_rank.h"

namespace zipcache::quant {
namespace {

using format::BlockLayout;
using format::Tensor;

// Loops of power iteration, as in the paper.
constexpr int kPowerLoops = 3;

void store_half(std::byte* halves, std::size_t index, float value) {
  const Half half = float_to_half(saturated_half(value));
  std::memcpy(halves + index * sizeof half, &half, sizeof half);
}

// The outliers of a head: vector `v`, number `o`, its place, and the index of the element in rows.
class Outliers {
 public:
  Outliers(const BlockLayout& layout, Tensor t, std::uint32_t head)
      : per_vector_(layout.tensor(t).outliers),
        n_vectors_(layout.outlier_vectors(t)),
        head_dim_(layout.head_dim(t)),
        is_key_(t == Tensor::kKey),
        length_(is_key_ ? layout.shape().n_tokens : head_dim_),
        begin_(layout.outliers(t, head)) {}

  std::size_t per_vector() const { return per_vector_; }
  std::size_t n_vectors() const { return n_vectors_; }
  std::size_t length() const { return length_; }
  std::size_t element(std::size_t v, std::size_t place) const {
    return is_key_ ? place * head_dim_ + v : v * head_dim_ + place;
  }
  std::uint16_t place(const std::byte* block, std::size_t v, std::size_t o) const {
    std::uint16_t place;
    std::memcpy(&place, block + place_at(v, o), sizeof place);
    return place;
  }
  std::size_t place_at(std::size_t v, std::size_t o) const {
    return begin_ + (v * per_vector_ + o) * sizeof(std::uint16_t);
  }
  std::size_t value_at(std::size_t v, std::size_t o) const {
    return begin_ + (n_vectors_ * per_vector_) * sizeof(std::uint16_t) +
           (v * per_vector_ + o) * sizeof(Half);
  }

  // call(v, o, index of the element)
  template <typename Call>
  void for_each(const std::byte* block, const Call& call) const {
    for (std::size_t v = 0; v < n_vectors_; ++v) {
      for (std::size_t o = 0; o < per_vector_; ++o) {
        call(v, o, element(v, place(block, v, o)));
      }
    }
  }

 private:
  std::size_t per_vector_, n_vectors_, head_dim_;
  bool is_key_;
  std::size_t length_, begin_;
};

void add_low_rank(const BlockLayout& layout, Tensor t, const std::byte* block, std::uint32_t head,
                  float* rows) {
  const std::size_t rank = layout.tensor(t).rank, n_tokens = layout.shape().n_tokens;
  const std::size_t dim = layout.head_dim(t);
  std::vector<float> token(rank * n_tokens), channel(rank * dim);
  const std::byte* factors = block + layout.low_rank(t, head);
  format::load_halves(factors, token.size(), token.data());
  format::load_halves(factors + token.size() * sizeof(Half), channel.size(), channel.data());
  for (std::size_t r = 0; r < rank; ++r) {
    for (std::size_t slot = 0; slot < n_tokens; ++slot) {
      const float weight = token[r * n_tokens + slot];
      for (std::size_t c = 0; c < dim; ++c) {
        rows[slot * dim + c] += weight * channel[r * dim + c];
      }
    }
  }
}

}  // namespace

void set_outliers_aside(const BlockLayout& layout, Tensor t, std::uint32_t head, float* rows,
                        std::byte* block) {
  const Outliers outliers(layout, t, head);
  const std::size_t half = outliers.per_vector() / 2;
  std::vector<std::uint16_t> places(outliers.length());
  for (std::size_t v = 0; v < outliers.n_vectors(); ++v) {
    float sum = 0.0f;
    for (std::size_t place = 0; place < outliers.length(); ++place) {
      sum += rows[outliers.element(v, place)];
    }
    std::iota(places.begin(), places.end(), std::uint16_t{0});
    const auto less = [&](std::uint16_t a, std::uint16_t b) {
      const float left = rows[outliers.element(v, a)], right = rows[outliers.element(v, b)];
      return left != right ? left < right : a < b;
    };
    const auto low_end = places.begin() + static_cast<std::ptrdiff_t>(outliers.per_vector() - half);
    std::partial_sort(places.begin(), low_end, places.end(), less);
    std::partial_sort(low_end, low_end + static_cast<std::ptrdiff_t>(half), places.end(),
                      [&](auto a, auto b) { return less(b, a); });
    std::sort(places.begin(), places.begin() + static_cast<std::ptrdiff_t>(outliers.per_vector()));
    for (std::size_t o = 0; o < outliers.per_vector(); ++o) {
      std::memcpy(block + outliers.place_at(v, o), &places[o], sizeof places[o]);
      rows[outliers.element(v, places[o])] = sum / static_cast<float>(outliers.length());
    }
  }
}

void write_corrections(const BlockLayout& layout, Tensor t, std::uint32_t head, const float* exact,
                       const float* coded, std::byte* block) {
  const std::size_t rank = layout.tensor(t).rank, n_tokens = layout.shape().n_tokens;
  const std::size_t dim = layout.head_dim(t);
  const Outliers outliers(layout, t, head);
  std::vector<float> error(n_tokens * dim);
  for (std::size_t at = 0; at < error.size(); ++at) {
    error[at] = exact[at] - coded[at];
  }
  outliers.for_each(block, [&](auto, auto, std::size_t at) { error[at] = 0.0f; });
  const LowRank factors = low_rank_factors(error, n_tokens, dim, rank, kPowerLoops);
  std::byte* out = block + layout.low_rank(t, head);
  for (std::size_t i = 0; i < factors.token.size(); ++i) {
    store_half(out, i, factors.token[i]);
  }
  for (std::size_t i = 0; i < factors.channel.size(); ++i) {
    store_half(out, factors.token.size() + i, factors.channel[i]);
  }
  std::vector<float> without(coded, coded + error.size());
  add_low_rank(layout, t, block, head, without.data());
  outliers.for_each(block, [&](std::size_t v, std::size_t o, std::size_t at) {
    store_half(block + outliers.value_at(v, o), 0, exact[at] - without[at]);
  });
}

void add_corrections(const BlockLayout& layout, Tensor t, const std::byte* block,
                     std::uint32_t head, float* rows) {
  add_low_rank(layout, t, block, head, rows);
  const Outliers outliers(layout, t, head);
  outliers.for_each(block, [&](std::size_t v, std::size_t o, std::size_t at) {
    float value;
    format::load_halves(block + outliers.value_at(v, o), 1, &value);
    rows[at] += value;
  });
}

}  // namespace zipcache::quant
