#include "cache/staging_page.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "quant/byte_rows.h"

namespace zipcache::cache {
namespace {

// Column `slot` of [rows, capacity] to column `target` of [rows, to_capacity].
template <typename T>
void copy_column(const T* from, std::size_t capacity, std::size_t slot, std::size_t rows, T* to,
                 std::size_t to_capacity, std::size_t target) {
  for (std::size_t row = 0; row < rows; ++row) {
    to[row * to_capacity + target] = from[row * capacity + slot];
  }
}

// The vectors of a page are [slots, ...] or [..., slots]; either grows without moving a slot.
template <typename Vector>
void copy_front(const Vector& from, Vector& to) {
  std::copy(from.begin(), from.end(), to.begin());
}
template <typename Vector>
void copy_columns(const Vector& from, std::size_t from_row, Vector& to, std::size_t to_row) {
  for (std::size_t at = 0, out = 0; at < from.size(); at += from_row, out += to_row) {
    std::memcpy(to.data() + out, from.data() + at, from_row * sizeof from[0]);
  }
}

}  // namespace

std::size_t StagingPage::Shape::row_bytes() const {
  const std::size_t elements = std::size_t{key_row} + value_row;
  return packed ? elements + std::size_t{2} * n_kv_heads * sizeof(Half) : elements * sizeof(Half);
}

std::size_t StagingPage::Shape::bytes() const {
  std::size_t of_token = row_bytes() + sizeof(std::uint32_t);
  if (has_tokens) {
    of_token += sizeof(StagedToken) + n_kv_heads * sizeof(float) * (has_squares ? 2 : 1);
  }
  return sizeof(StagingPage) + capacity * of_token;
}

StagingPage::StagingPage(const Shape& made) : shape(made) {
  ZC_CHECK(shape.capacity > 0 && shape.capacity <= kPageTokens);
  ZC_CHECK(!shape.packed || shape.n_kv_heads > 0);
  const std::size_t element = shape.packed ? 1 : sizeof(Half);
  keys.resize(std::size_t{shape.key_row} * shape.capacity * element);
  values.resize(std::size_t{shape.value_row} * shape.capacity * element);
  scales.resize(shape.packed ? std::size_t{2} * shape.n_kv_heads * shape.capacity : 0);
  cells.resize(shape.capacity, kNoCell);
  if (shape.has_tokens) {
    tokens.resize(shape.capacity);
    mass.resize(std::size_t{shape.capacity} * shape.n_kv_heads);
    squares.resize(shape.has_squares ? mass.size() : 0);
  }
}

std::uint32_t StagingPage::free_slot() const {
  const auto found = std::find(cells.begin(), cells.end(), kNoCell);
  ZC_CHECK(found != cells.end());
  return static_cast<std::uint32_t>(found - cells.begin());
}

void StagingPage::read(Tensor tensor, std::uint32_t slot, float* row) const {
  const bool is_key = tensor == Tensor::kKey;
  const std::uint32_t width = is_key ? shape.key_row : shape.value_row;
  const std::size_t stride = is_key ? shape.capacity : 1;
  const std::size_t first = is_key ? slot : std::size_t{slot} * width;
  if (!shape.packed) {
    const Half* from = (is_key ? exact_keys() : exact_values()) + first;
    for (std::uint32_t c = 0; c < width; ++c) {
      row[c] = half_to_float(from[c * stride]);
    }
    return;
  }
  const std::uint8_t* from = (is_key ? key_codes() : value_codes()) + first;
  const std::uint32_t dim = width / shape.n_kv_heads;
  for (std::uint32_t head = 0; head < shape.n_kv_heads; ++head) {
    const float scale = half_to_float(slot_scales(tensor, head)[slot]);
    for (std::uint32_t c = head * dim; c < (head + 1) * dim; ++c) {
      row[c] = quant::decode_byte(scale, from[c * stride]);
    }
  }
}

void StagingPage::write(Tensor tensor, std::uint32_t slot, const float* row) {
  const bool is_key = tensor == Tensor::kKey;
  const std::uint32_t width = is_key ? shape.key_row : shape.value_row;
  const std::size_t stride = is_key ? shape.capacity : 1;
  const std::size_t first = is_key ? slot : std::size_t{slot} * width;
  if (!shape.packed) {
    Half* to = (is_key ? exact_keys() : exact_values()) + first;
    bool finite = true;
    for (std::uint32_t c = 0; c < width; ++c) {
      to[c * stride] = float_to_half(row[c]);
      finite &= (to[c * stride] & 0x7c00u) != 0x7c00u;
    }
    has_non_finite |= !is_key && !finite;
    return;
  }
  auto* to = reinterpret_cast<std::uint8_t*>(is_key ? keys.data() : values.data()) + first;
  const std::uint32_t dim = width / shape.n_kv_heads;
  for (std::uint32_t head = 0; head < shape.n_kv_heads; ++head) {
    const std::size_t scale_row = is_key ? head : shape.n_kv_heads + head;
    scales[scale_row * shape.capacity + slot] = quant::encode_byte_row(
        {row + std::size_t{head} * dim, dim}, to + std::size_t{head} * dim * stride, stride);
  }
}

void StagingPage::read_all_keys(float* out) const {
  if (!shape.packed) {
    halves_to_floats(exact_keys(), std::size_t{shape.key_row} * shape.capacity, out);
    return;
  }
  const std::uint32_t dim = shape.key_row / shape.n_kv_heads;
  const std::uint8_t* codes = key_codes();
  for (std::uint32_t c = 0; c < shape.key_row; ++c) {
    const Half* of_head = slot_scales(Tensor::kKey, c / dim);
    for (std::uint32_t slot = 0; slot < shape.capacity; ++slot) {
      *out++ = quant::decode_byte(half_to_float(of_head[slot]), *codes++);
    }
  }
}

void StagingPage::reset_statistics(std::uint32_t slot, std::uint32_t arrival) {
  if (tokens.empty()) {
    return;
  }
  tokens[slot] = {.arrival = arrival};
  const std::size_t first = std::size_t{slot} * shape.n_kv_heads;
  std::fill_n(mass.begin() + static_cast<std::ptrdiff_t>(first), shape.n_kv_heads, 0.0f);
  if (!squares.empty()) {
    std::fill_n(squares.begin() + static_cast<std::ptrdiff_t>(first), shape.n_kv_heads, 0.0f);
  }
}

StagingPage StagingPage::grown(std::uint32_t capacity) const {
  ZC_CHECK(capacity >= shape.capacity);
  Shape larger = shape;
  larger.capacity = capacity;
  StagingPage page(larger);
  page.used = used;
  page.has_non_finite = has_non_finite;
  const std::size_t element = shape.packed ? 1 : sizeof(Half);
  copy_columns(keys, shape.capacity * element, page.keys, capacity * element);
  copy_columns(scales, shape.capacity, page.scales, capacity);
  copy_front(values, page.values);
  copy_front(cells, page.cells);
  copy_front(tokens, page.tokens);
  copy_front(mass, page.mass);
  copy_front(squares, page.squares);
  return page;
}

std::uint32_t StagingPage::move_to(StagingPage& to, std::uint32_t slot, std::vector<float>& row) {
  const std::uint32_t target = to.free_slot();
  if (shape.packed == to.shape.packed) {  // as they are, bit by bit
    const std::uint32_t n = shape.capacity, n_to = to.shape.capacity;
    if (shape.packed) {
      copy_column(keys.data(), n, slot, shape.key_row, to.keys.data(), n_to, target);
      copy_column(scales.data(), n, slot, std::size_t{2} * shape.n_kv_heads, to.scales.data(), n_to,
                  target);
    } else {
      copy_column(exact_keys(), n, slot, shape.key_row, to.exact_keys(), n_to, target);
    }
    const std::size_t row_bytes = shape.value_row * (shape.packed ? 1 : sizeof(Half));
    std::memcpy(to.values.data() + target * row_bytes, values.data() + slot * row_bytes, row_bytes);
  } else {
    row.resize(std::max(shape.key_row, shape.value_row));
    for (const Tensor tensor : {Tensor::kKey, Tensor::kValue}) {
      read(tensor, slot, row.data());
      to.write(tensor, target, row.data());
    }
  }
  if (!to.tokens.empty()) {
    to.tokens[target] = tokens[slot];
    for (std::size_t head = 0; head < shape.n_kv_heads; ++head) {
      const std::size_t from = std::size_t{slot} * shape.n_kv_heads + head;
      const std::size_t at = std::size_t{target} * shape.n_kv_heads + head;
      to.mass[at] = mass[from];
      if (!to.squares.empty()) {
        to.squares[at] = squares[from];
      }
    }
  }
  to.has_non_finite |= has_non_finite && !to.shape.packed;
  to.cells[target] = cells[slot];
  cells[slot] = kNoCell;
  ++to.used;
  --used;
  return target;
}

}  // namespace zipcache::cache
