// A model's tokens are bytes, and one character may be spread over several of them. This turns
// pieces of bytes into pieces of valid UTF-8.
#pragma once

#include <string>
#include <string_view>

namespace zipcache::cli {

class Utf8Stream {
 public:
  // The complete characters so far; the start of one is kept for the next call. Bytes that belong
  // to no character become U+FFFD.
  std::string push(std::string_view bytes);
  // What is still kept, as U+FFFD.
  std::string finish();

 private:
  std::string pending_;
};

// `text` without the incomplete character that it may end with.
std::string_view without_partial_character(std::string_view text);

}  // namespace zipcache::cli
