#include "policy/method.h"

namespace zipcache::policy {

std::span<const Method> methods() {
  static const std::vector<Method> kAll = {
      zipcache_method(), fp16_method(), uniform_method(), h2o_method(),    mikv_method(),
      kivi_method(),     gear_method(), gear_l_method(),  static_method(), skvq_method(),
  };
  return kAll;
}

std::vector<std::string_view> method_names() {
  std::vector<std::string_view> names;
  for (const Method& method : methods()) {
    names.push_back(method.name);
  }
  return names;
}

}  // namespace zipcache::policy
