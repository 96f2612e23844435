#include "ref/official_packing_ref.h"

#include <cstddef>

namespace zipcache::ref {
namespace {

std::vector<std::uint8_t> pack(std::span<const std::uint8_t> codes, int bits) {
  const std::size_t n_bytes = codes.size() * bits / 8;
  std::vector<std::uint8_t> bytes(n_bytes);
  for (std::size_t at = 0; at < codes.size(); ++at) {
    bytes[at % n_bytes] |= static_cast<std::uint8_t>(codes[at] << (at / n_bytes * bits));
  }
  return bytes;
}

std::vector<std::uint8_t> unpack(std::span<const std::uint8_t> bytes, int bits) {
  std::vector<std::uint8_t> codes(bytes.size() * 8 / bits);
  for (std::size_t at = 0; at < codes.size(); ++at) {
    const int shifted = bytes[at % bytes.size()] >> (at / bytes.size() * bits);
    codes[at] = static_cast<std::uint8_t>(shifted & ((1 << bits) - 1));
  }
  return codes;
}

}  // namespace

std::vector<std::uint8_t> official_pack2(std::span<const std::uint8_t> codes) {
  return pack(codes, 2);
}
std::vector<std::uint8_t> official_pack4(std::span<const std::uint8_t> codes) {
  return pack(codes, 4);
}
std::vector<std::uint8_t> official_unpack2(std::span<const std::uint8_t> bytes) {
  return unpack(bytes, 2);
}
std::vector<std::uint8_t> official_unpack4(std::span<const std::uint8_t> bytes) {
  return unpack(bytes, 4);
}

}  // namespace zipcache::ref
