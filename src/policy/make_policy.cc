// From settings to a checked policy, and what there is to choose from.
#include "policy/method.h"
#include "policy/policy.h"

namespace zipcache::policy {
namespace {

const Method* read_method(SettingReader& in) {
  std::vector<Named<const Method*>> choices;
  for (const Method& method : methods()) {
    choices.push_back({method.name, &method});
  }
  return in.choice<const Method*>("policy", std::span<const Named<const Method*>>(choices),
                                  choices.front().value);
}

PolicyHelp help_of(const Method& method, const Method::Mode& mode) {
  PolicyHelp help{std::string(method.name), std::string(mode.summary), {}};
  Settings settings;
  if (!mode.name.empty()) {
    help.name += " mode=" + std::string(mode.name);
    settings["mode"] = mode.name;
  }
  SettingReader in(settings);
  method.make(in);
  help.defaults = in.resolved();
  return help;
}

}  // namespace

const std::vector<PolicyHelp>& policy_help() {
  static const std::vector<PolicyHelp> kHelp = [] {
    std::vector<PolicyHelp> all;
    for (const Method& method : methods()) {
      all.push_back(help_of(method, {"", method.summary}));
      for (const Method::Mode& mode : method.modes) {
        all.push_back(help_of(method, mode));
      }
    }
    return all;
  }();
  return kHelp;
}

const std::vector<SettingHelp>& setting_help() {
  static const std::vector<SettingHelp> kHelp = [] {
    std::vector<SettingHelp> all = setting_words();
    const PolicyHelp& defaults = policy_help().front();
    for (SettingHelp& setting : all) {
      const auto found = defaults.defaults.find(setting.name);
      if (setting.name == "policy") {
        setting.help += " (default " + defaults.name + ")";
      } else if (found != defaults.defaults.end()) {
        setting.help += " (default " + found->second + ")";
      }
    }
    return all;
  }();
  return kHelp;
}

Expected<Policy> make_policy(const std::map<std::string, std::string>& settings,
                             const Calibration* calibration) {
  SettingReader in(settings, calibration);
  in.check_known();
  const Method* method = read_method(in);
  in.check_applies(method->name, method->settings);
  Policy policy = method->make(in);
  if (in.error()) {
    return *in.error();
  }
  policy.name = method->name;
  policy.settings = in.resolved();
  return policy;
}

std::map<std::string, std::string> to_settings(const Policy& policy) { return policy.settings; }

}  // namespace zipcache::policy
