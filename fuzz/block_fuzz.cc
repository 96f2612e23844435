// Untrusted bytes as the shape and content of a sealed block: an invalid shape is refused, a block
// that is_sound() decodes without touching memory outside it, and codes survive pack and unpack.
#include <cstring>
#include <vector>

#include "base/aligned.h"
#include "format/block.h"
#include "quant/block_codec.h"
#include "require.h"

namespace {

using namespace zipcache;

// Reads numbers off the front of the input; zeros when it is used up.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() {
    if (size_ == 0) {
      return 0;
    }
    --size_;
    return *data_++;
  }
  void fill(std::byte* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      out[i] = static_cast<std::byte>(byte());
    }
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

format::TensorFormat read_format(Input& in) {
  format::TensorFormat f;
  f.granularity = static_cast<format::Granularity>(in.byte() % 4);
  f.token_params = static_cast<format::TokenParams>(in.byte() % 3);
  f.class_factors = in.byte() % 2 != 0;
  f.slot_shared = in.byte() % 2 != 0;
  f.group_channels = in.byte();
  f.n_classes = in.byte() % 4;
  f.bits = {static_cast<std::uint8_t>(in.byte() % 10), static_cast<std::uint8_t>(in.byte() % 10)};
  f.class0_tokens = in.byte();
  return f;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input in(data, size);
  format::BlockShape shape;
  shape.n_tokens = in.byte();
  shape.n_kv_heads = in.byte() % 4;
  shape.key_dim = in.byte();
  shape.value_dim = in.byte();
  shape.key = read_format(in);
  shape.value = read_format(in);
  for (format::TensorFormat* f : {&shape.key, &shape.value}) {
    const std::uint8_t more = in.byte();
    f->group_tokens = static_cast<std::uint16_t>((more & 3) * 16);
    f->given_factors = (more & 4) != 0;
    f->reordered = (more & 8) != 0;
    f->rank = more >> 4 & 3;
    f->outliers = more >> 6;
    for (std::uint8_t& bits : f->bits) {
      bits = bits == 9 ? format::kExactBits : bits;
    }
  }
  const std::uint8_t wide = in.byte();
  shape.key.wide_channels = static_cast<std::uint16_t>((wide & 7) * 16);
  shape.key.wide_bits = wide >> 4;
  if (!format::BlockLayout::is_valid(shape)) {
    return 0;
  }
  const format::BlockLayout layout(shape);
  AlignedVector<std::byte> block(layout.total_bytes());
  in.fill(block.data(), block.size());
  if (format::is_sound(layout, block.data())) {
    const std::size_t rows = std::size_t{shape.n_tokens} * shape.n_kv_heads;
    std::vector<float> keys(rows * shape.key_dim), values(rows * shape.value_dim);
    quant::decode_block(layout, block.data(), keys, values);
  }

  const int bits = shape.key.bits[0];
  if (!format::is_code_width(bits)) {
    return 0;
  }
  std::vector<std::uint8_t> codes(std::size_t{shape.n_tokens} * shape.key_dim);
  for (std::uint8_t& code : codes) {
    code = in.byte() & ((1 << bits) - 1);
  }
  AlignedVector<std::byte> packed(format::matrix_bytes(bits, shape.n_tokens, shape.key_dim));
  format::pack_codes(bits, shape.n_tokens, shape.key_dim, codes, packed);
  std::vector<std::uint8_t> unpacked(codes.size());
  format::unpack_codes(bits, shape.n_tokens, shape.key_dim, packed, unpacked);
  require(unpacked == codes);
  return 0;
}
