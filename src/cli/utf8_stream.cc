#include "cli/utf8_stream.h"

#include <cstddef>
#include <cstdint>

namespace zipcache::cli {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct ByteRange {
  std::uint8_t min = 0x80;
  std::uint8_t max = 0xBF;
  bool contains(std::uint8_t byte) const { return byte >= min && byte <= max; }
};

// Bytes of the character that `lead` begins; 0 if it begins none.
std::size_t length_of(std::uint8_t lead) {
  if (lead < 0x80) {
    return 1;
  }
  if (lead < 0xC2 || lead > 0xF4) {
    return 0;
  }
  return lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

// The second byte also keeps out overlong forms, surrogates and what is above U+10FFFF.
ByteRange second_byte_of(std::uint8_t lead) {
  switch (lead) {
    case 0xE0:
      return {.min = 0xA0};
    case 0xED:
      return {.max = 0x9F};
    case 0xF0:
      return {.min = 0x90};
    case 0xF4:
      return {.max = 0x8F};
    default:
      return {};
  }
}

struct Start {
  std::size_t n_bytes = 0;   // valid bytes at the beginning, 0 if the first one is wrong
  bool is_complete = false;  // they are a whole character
};

// REQUIRES: !text.empty()
Start look_at_start(std::string_view text) {
  const auto lead = static_cast<std::uint8_t>(text[0]);
  const std::size_t length = length_of(lead);
  if (length == 0) {
    return {};
  }
  std::size_t n_valid = 1;
  while (n_valid < length && n_valid < text.size()) {
    const ByteRange range = n_valid == 1 ? second_byte_of(lead) : ByteRange{};
    if (!range.contains(static_cast<std::uint8_t>(text[n_valid]))) {
      break;
    }
    ++n_valid;
  }
  return {n_valid, n_valid == length};
}

}  // namespace

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string characters;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Start start = look_at_start(rest);
    if (start.is_complete) {
      characters += rest.substr(0, start.n_bytes);
      rest.remove_prefix(start.n_bytes);
    } else if (start.n_bytes == rest.size()) {
      break;  // may become a character yet
    } else {
      characters += kReplacement;
      rest.remove_prefix(start.n_bytes == 0 ? 1 : start.n_bytes);
    }
  }
  pending_ = std::string(rest);
  return characters;
}

std::string Utf8Stream::finish() {
  const bool has_rest = !pending_.empty();
  pending_.clear();
  return has_rest ? std::string(kReplacement) : std::string();
}

std::string_view without_partial_character(std::string_view text) {
  constexpr std::size_t kMaxBytes = 4;
  for (std::size_t n_back = 1; n_back < kMaxBytes && n_back <= text.size(); ++n_back) {
    const std::string_view end = text.substr(text.size() - n_back);
    const Start start = look_at_start(end);
    if (start.n_bytes == end.size()) {
      return start.is_complete ? text : text.substr(0, text.size() - n_back);
    }
  }
  return text;
}

}  // namespace zipcache::cli
