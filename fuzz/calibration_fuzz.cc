// Any text as a calibration file: an error of one line, or figures that write and read back the
// same, and of which every policy makes something that encodes.
#include <cstdint>
#include <string>
#include <string_view>

#include "policy/calibration.h"
#include "policy/policy.h"
#include "require.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace zipcache::policy;
  const auto read = parse_calibration({reinterpret_cast<const char*>(data), size});
  if (!read) {
    require(!read.error().message.empty());
    require(read.error().message.find('\n') == std::string::npos);
    return 0;
  }
  const auto again = parse_calibration(calibration_text(*read));
  require(static_cast<bool>(again) && *again == *read);
  for (const char* name : {"static", "skvq"}) {
    const auto policy = make_policy({{"policy", name}}, &*read);
    require(static_cast<bool>(policy));
    for (const LayerCalibration& layer : read->layers) {
      require(static_cast<bool>(
          serves_layer(*policy, layer.layer, layer.n_kv_heads, layer.key_dim, layer.value_dim)));
      for (const float factor : policy->given.at(layer.layer).key_factors) {
        require(factor > 0 && factor < 1e30f);
      }
    }
  }
  return 0;
}
