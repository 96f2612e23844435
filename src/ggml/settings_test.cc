#include "ggml/settings.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <sstream>

namespace zipcache::ggml {
namespace {

SettingMap must_read(const std::vector<const char*>& environment) {
  std::vector<const char*> terminated = environment;
  terminated.push_back(nullptr);
  const auto values = settings_from_environment(terminated.data());
  EXPECT_TRUE(values) << values.error().message;
  return values ? *values : SettingMap{};
}

std::string error_of(const std::vector<const char*>& environment) {
  std::vector<const char*> terminated = environment;
  terminated.push_back(nullptr);
  const auto values = settings_from_environment(terminated.data());
  return values ? "" : values.error().message;
}

TEST(Environment, TakesItsOwnVariablesOnly) {
  const SettingMap values =
      must_read({"HOME=/root", "ZIPCACHE_POLICY=fp16", "PATH=/bin", "ZIPCACHE_LIMIT_MIB=12",
                 "XZIPCACHE_KEY=1", "ZIPCACHE_KEY_BITS=4,3"});
  EXPECT_EQ(values, (SettingMap{{"policy", "fp16"}, {"limit-mib", "12"}, {"key-bits", "4,3"}}));
  EXPECT_TRUE(must_read({}).empty());
  EXPECT_TRUE(settings_from_environment(nullptr));
}

TEST(Environment, IgnoresWhatBuildAndTestsUse) {
  EXPECT_TRUE(
      must_read({"ZIPCACHE_DATA=/data", "ZIPCACHE_CACHE_DIR=/x", "ZIPCACHE_LLAMA_DIR=/y"}).empty());
}

TEST(Environment, AMisspeltVariableIsAnErrorThatNamesItAndTheRest) {
  const std::string error = error_of({"ZIPCACHE_KEYBITS=4"});
  EXPECT_NE(error.find("ZIPCACHE_KEYBITS"), std::string::npos) << error;
  EXPECT_NE(error.find("key-bits"), std::string::npos) << error;
  EXPECT_NE(error.find("limit-mib"), std::string::npos) << error;
  EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  EXPECT_NE(error_of({"ZIPCACHE_=1"}), "");
}

TEST(Environment, EverySettingHasAVariable) {
  for (const auto* settings : {&policy::setting_help(), &own_setting_help()}) {
    for (const policy::SettingHelp& help : *settings) {
      const std::string entry = variable_name(help.name) + "=x";
      EXPECT_EQ(must_read({entry.c_str()}), (SettingMap{{help.name, "x"}}));
    }
  }
  EXPECT_EQ(variable_name("key-bits"), "ZIPCACHE_KEY_BITS");
}

TEST(Lines, NameAndValue) {
  const auto values = settings_from_lines("policy=uniform\n\nkey-bits=4\nreport=a=b");
  ASSERT_TRUE(values);
  EXPECT_EQ(*values, (SettingMap{{"policy", "uniform"}, {"key-bits", "4"}, {"report", "a=b"}}));
  EXPECT_TRUE(settings_from_lines(""));
  EXPECT_FALSE(settings_from_lines("policy"));
  EXPECT_FALSE(settings_from_lines("polcy=fp16"));
}

TEST(MakeSettings, Defaults) {
  const auto settings = make_settings({});
  ASSERT_TRUE(settings);
  EXPECT_EQ(settings->policy->name, "zipcache");
  EXPECT_EQ(settings->budget->limit(), SIZE_MAX);
  EXPECT_EQ(settings->report, "stderr");
}

TEST(MakeSettings, Values) {
  const auto settings = make_settings(
      {{"policy", "fp16"}, {"limit-mib", "3"}, {"report", "0"}, {"force-isa", "avx2"}});
  ASSERT_TRUE(settings);
  EXPECT_EQ(settings->policy->name, "fp16");
  EXPECT_EQ(settings->budget->limit(), std::size_t{3} << 20);
  EXPECT_EQ(settings->report, "0");
  EXPECT_EQ(settings->force_isa, "avx2");
}

TEST(MakeSettings, BadLimits) {
  for (const char* limit :
       {"", "0", "-1", "1.5", "12x", "99999999999999999999", "18446744073709"}) {
    const auto settings = make_settings({{"limit-mib", limit}});
    ASSERT_FALSE(settings) << limit;
    EXPECT_NE(settings.error().message.find("limit-mib"), std::string::npos);
  }
}

TEST(MakeSettings, ErrorsOfThePolicyComeThrough) {
  const auto settings = make_settings({{"key-bits", "5"}});
  ASSERT_FALSE(settings);
  EXPECT_NE(settings.error().message.find("key-bits"), std::string::npos);
}

class CalibrationFile : public testing::Test {
 protected:
  ~CalibrationFile() override { std::remove(path_.c_str()); }

  void write(const std::string& text) const { std::ofstream(path_, std::ios::binary) << text; }

  std::string error_of(const std::string& policy) const {
    const auto settings = make_settings({{"policy", policy}, {"calibration", path_}});
    std::string error = settings ? "no error" : settings.error().message;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
    return error;
  }

  const std::string path_ = testing::TempDir() + "/" +
                            testing::UnitTest::GetInstance()->current_test_info()->name() + ".json";
};

TEST_F(CalibrationFile, IsReadForThePolicyThatNamesIt) {
  write(policy::calibration_text(policy::flat_calibration(2, 32, 64)));
  for (const char* policy : {"static", "skvq"}) {
    const auto settings = make_settings({{"policy", policy}, {"calibration", path_}});
    ASSERT_TRUE(settings) << settings.error().message;
    EXPECT_EQ(settings->policy->given.at(0).value_dim, 64u);
    EXPECT_EQ(settings->policy->settings.at("calibration"), path_);
  }
  EXPECT_NE(error_of("uniform").find("calibration: does not apply"), std::string::npos);
}

TEST_F(CalibrationFile, MissingOrMalformedIsRefused) {
  EXPECT_EQ(error_of("static"), "calibration: can't read " + path_ +
                                    "; make it with: zipcache calibrate -m MODEL -o FILE");
  write("");
  EXPECT_NE(error_of("static").find("can't read " + path_), std::string::npos);
  write("policy=static");
  EXPECT_EQ(error_of("static").find("calibration " + path_ + ": found no calibration"), 0u);
  std::string text = policy::calibration_text(policy::flat_calibration(2, 32, 64));
  write(text.substr(0, text.size() / 2));
  EXPECT_EQ(error_of("skvq").find("calibration " + path_ + ": found no calibration"), 0u);
  text.replace(text.find("\"version\":1"), 11, "\"version\":9");
  write(text);
  EXPECT_EQ(error_of("skvq").find("calibration " + path_ + ": found version 9, supported is 1"),
            0u);
}

TEST(MakeSettings, Observe) {
  EXPECT_FALSE(make_settings({})->observes);
  EXPECT_TRUE(make_settings({{"observe", "on"}})->observes);
  EXPECT_FALSE(make_settings({{"observe", "off"}})->observes);
  EXPECT_EQ(make_settings({{"observe", "1"}}).error().message,
            "observe: found '1', accepted: on, off");
}

// The table of the user's page is what the code says.
TEST(Docs, SettingsTable) {
  std::ifstream file(ZIPCACHE_DOCS_PAGE);
  ASSERT_TRUE(file) << ZIPCACHE_DOCS_PAGE;
  std::stringstream page;
  page << file.rdbuf();
  std::string table = "| variable | values | what it does |\n|---|---|---|\n";
  for (const auto* settings : {&policy::setting_help(), &own_setting_help()}) {
    for (const policy::SettingHelp& help : *settings) {
      table += "| `" + variable_name(help.name) + "` | " + help.values + " | " + help.help + " |\n";
    }
  }
  EXPECT_NE(page.str().find(table), std::string::npos) << "expected:\n" << table;
}

TEST(Docs, PoliciesTable) {
  std::ifstream file(ZIPCACHE_DOCS_PAGE);
  ASSERT_TRUE(file) << ZIPCACHE_DOCS_PAGE;
  std::stringstream page;
  page << file.rdbuf();
  std::string table =
      "| policy | what it does | its settings and their defaults |\n|---|---|---|\n";
  for (const policy::PolicyHelp& help : policy::policy_help()) {
    std::string defaults;
    for (const auto& [name, text] : help.defaults) {
      defaults += defaults.empty() ? "`" : " ";
      defaults.append(name).append("=").append(text);
    }
    defaults += defaults.empty() ? "none" : "`";
    table += "| `" + help.name + "` | " + help.summary + " | " + defaults + " |\n";
  }
  EXPECT_NE(page.str().find(table), std::string::npos) << "expected:\n" << table;
}

}  // namespace
}  // namespace zipcache::ggml
