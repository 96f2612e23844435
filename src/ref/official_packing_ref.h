// How the published code packs a row of n codes (a planar order over all channels): what an
// importer of its caches reads. Never used for blocks of our own.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace zipcache::ref {

// byte[j] = q[j] | q[j + n/4] << 2 | q[j + n/2] << 4 | q[j + 3n/4] << 6. REQUIRES: n % 4 == 0.
std::vector<std::uint8_t> official_pack2(std::span<const std::uint8_t> codes);
// byte[j] = q[j] | q[j + n/2] << 4. REQUIRES: n % 2 == 0.
std::vector<std::uint8_t> official_pack4(std::span<const std::uint8_t> codes);

std::vector<std::uint8_t> official_unpack2(std::span<const std::uint8_t> bytes);
std::vector<std::uint8_t> official_unpack4(std::span<const std::uint8_t> bytes);

}  // namespace zipcache::ref
