// What a policy is to this room: a file that turns settings into a Policy. Internal to this room.
//
// To add one: a file with a function like those below, its line in method.cc and in CMakeLists.txt,
// and words in setting_words() for settings that no other policy has. make() starts from the
// policy's own preset and reads every setting that it takes through the reader, which applies what
// the user gave and keeps what was read; nothing else has to know the setting.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "policy/settings.h"

namespace zipcache::policy {

struct Method {
  std::string_view name;                   // value of the setting `policy`
  std::string_view summary;                // one line for the docs
  std::vector<std::string_view> settings;  // those that it takes beside `policy`, as in the docs
  Policy (*make)(SettingReader& in) = nullptr;
  // Values of `mode` beside the default that docs list, and what each is.
  struct Mode {
    std::string_view name, summary;
  };
  std::vector<Mode> modes;
};

// Policies in the order of the docs; the first is the default.
std::span<const Method> methods();
std::vector<std::string_view> method_names();

Method zipcache_method();  // zipcache.cc
Method fp16_method();      // fp16.cc
Method uniform_method();   // uniform.cc
Method kivi_method();      // kivi.cc
Method h2o_method();       // h2o.cc
Method mikv_method();      // mikv.cc
Method gear_method();      // gear.cc
Method gear_l_method();    // gear.cc
Method static_method();    // static.cc
Method skvq_method();      // skvq.cc

}  // namespace zipcache::policy
