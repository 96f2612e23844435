// Any text as settings: an error or a policy whose own settings give the same policy back, and
// which never seals more tokens than there are.
#include <cstdint>
#include <map>
#include <numeric>
#include <string>

#include "policy/policy.h"
#include "require.h"

// Input: lines of name=value.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  std::map<std::string, std::string> settings;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    const std::size_t equals = line.find('=');
    settings[line.substr(0, equals)] = equals == std::string::npos ? "" : line.substr(equals + 1);
    begin = end + 1;
  }
  using namespace zipcache;
  const Expected<policy::Policy> made = policy::make_policy(settings);
  if (!made) {
    require(!made.error().message.empty());
    return 0;
  }
  const auto again = policy::make_policy(policy::to_settings(*made));
  require(static_cast<bool>(again) && policy::describe(*again) == policy::describe(*made));
  for (const std::uint32_t n : {0u, 1u, 33u, 64u, 1000u}) {
    const auto blocks = policy::plan_seal(*made, n, 1);
    require(std::accumulate(blocks.begin(), blocks.end(), 0u) <= n);
  }
  return 0;
}
