#include "eval/windows.h"

#include <algorithm>
#include <string>

#include "base/check.h"

namespace zipcache::eval {

std::span<const std::int32_t> skip_windows(std::span<const std::int32_t> tokens, std::size_t n_ctx,
                                           std::uint32_t percent) {
  ZC_CHECK(n_ctx >= 1 && percent < 100);
  const std::size_t n_windows = tokens.size() / n_ctx;
  return tokens.subspan((n_windows * percent + 99) / 100 * n_ctx);
}

Expected<std::vector<Window>> cut_windows(std::span<const std::int32_t> tokens, std::size_t n_ctx,
                                          std::size_t max_windows, std::int32_t bos) {
  ZC_CHECK(n_ctx >= 4);
  std::size_t n_windows = tokens.size() / n_ctx;
  if (n_windows == 0) {
    return invalid_argument("the text has " + std::to_string(tokens.size()) +
                            " tokens, a window takes " + std::to_string(n_ctx) +
                            ": give a longer text or a smaller context (-c)");
  }
  if (max_windows != 0) {
    n_windows = std::min(n_windows, max_windows);
  }
  std::vector<Window> windows;
  for (std::size_t index = 0; index < n_windows; ++index) {
    const auto part = tokens.subspan(index * n_ctx, n_ctx);
    Window window{.tokens = {part.begin(), part.end()}, .first_scored = n_ctx / 2};
    if (bos >= 0) {
      window.tokens.front() = bos;
    }
    windows.push_back(std::move(window));
  }
  return windows;
}

}  // namespace zipcache::eval
