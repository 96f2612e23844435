#include "eval/policy_spec.h"

#include <algorithm>

namespace zipcache::eval {

Expected<PolicySpec> parse_policy(const std::string& text) {
  static const std::map<std::string, std::string> kHostTypes = {
      {kReferencePolicy, "f16"}, {"q8_0", "q8_0"}, {"q4_0", "q4_0"}};
  PolicySpec spec{.name = text};
  if (const auto host = kHostTypes.find(text); host != kHostTypes.end()) {
    spec.host_type = host->second;
    return spec;
  }
  if (text == "default") {
    return spec;
  }
  std::string* value = nullptr;  // of the latest name: a part without '=' continues it
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    const std::size_t equals = part.find('=');
    if (equals != std::string::npos && equals > 0) {
      const std::string name = part.substr(0, equals);
      if (spec.settings.contains(name)) {
        return invalid_argument("policy '" + text + "': " + name + " is given twice");
      }
      value = &(spec.settings[name] = part.substr(equals + 1));
    } else if (value != nullptr) {
      *value += "," + part;
    } else {
      return invalid_argument("policy '" + text +
                              "': expected name=value,... or one of default, fp16, q8_0, q4_0");
    }
    begin = end + 1;
  }
  return spec;
}

Expected<std::vector<PolicySpec>> parse_policies(std::span<const std::string> texts) {
  std::vector<PolicySpec> specs = {parse_policy(kReferencePolicy).value()};
  for (const std::string& text : texts) {
    if (text == kReferencePolicy) {
      continue;
    }
    const bool is_known = std::any_of(specs.begin(), specs.end(),
                                      [&](const PolicySpec& spec) { return spec.name == text; });
    if (is_known) {
      return invalid_argument("policy '" + text + "' is given twice");
    }
    Expected<PolicySpec> spec = parse_policy(text);
    if (!spec) {
      return spec.error();
    }
    specs.push_back(std::move(*spec));
  }
  return specs;
}

}  // namespace zipcache::eval
