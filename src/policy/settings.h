// Reads settings (name -> text) into typed values, with one clear line for what is wrong. Internal
// to this room.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/expected.h"
#include "policy/names.h"
#include "policy/policy.h"

namespace zipcache::policy {

using Settings = std::map<std::string, std::string>;

// All settings, without defaults: a policy knows those.
const std::vector<SettingHelp>& setting_words();

// "30", "12.5", "0.05"
std::string percent_text(std::uint32_t hundredths);
// The shortest decimal that reads back as the same float.
std::string float_text(float value);

// Accepted: min..max in steps of `step`, counted from 0; and 0 if `or_zero`.
struct CountRange {
  std::uint32_t min = 0;
  std::uint32_t max = 0;
  std::uint32_t step = 1;
  bool or_zero = false;
};

// Each reader returns `fallback` when the setting is absent or something failed before, so that a
// caller reads everything in a row and looks at error() once. The first error is kept. What was
// read, given or not, is in resolved(): reading is all that a policy has to do about a setting.
class SettingReader {
 public:
  // REQUIRES: both outlive the reader; `calibration` may be nullptr.
  explicit SettingReader(const Settings& settings, const Calibration* calibration = nullptr)
      : settings_(settings), calibration_(calibration) {}

  const std::optional<Error>& error() const { return error_; }
  const Settings& resolved() const { return resolved_; }

  // Fails if a name is none of setting_words(), with the nearest one as a hint.
  void check_known();
  // Fails if a setting is given that is not among those of the policy of that name.
  void check_applies(std::string_view policy, const std::vector<std::string_view>& applicable);
  // Fails with "NAME: MESSAGE".
  void fail(std::string_view name, std::string_view message);
  // Fails with "NAME: found 'TEXT', EXPECTED" if `name` is given.
  void reject(std::string_view name, std::string_view expected);

  // The same, where another setting decides instead: the name is no longer in resolved().
  void override(std::string_view name, std::string_view expected);

  template <typename T>
  T choice(std::string_view name, std::span<const Named<T>> choices, T fallback);
  template <typename T, std::size_t N>
  T choice(std::string_view name, const std::array<Named<T>, N>& choices, T fallback) {
    return choice(name, std::span<const Named<T>>(choices), fallback);
  }
  std::uint32_t count(std::string_view name, const CountRange& range, std::uint32_t fallback);
  // As count(), of hundredths: "3.05" is 305.
  std::uint32_t hundredths(std::string_view name, const CountRange& range, std::uint32_t fallback);
  std::uint64_t seed(std::string_view name, std::uint64_t fallback);
  // Percent with up to two decimals, as basis points.
  std::uint32_t percent(std::string_view name, std::uint32_t fallback_bp);
  // HI,LO with HI >= LO (if max_classes is 2), or one width: as many as there are classes. With
  // `exact_high` HI may be 16.
  std::vector<std::uint8_t> bits(std::string_view name, std::size_t max_classes,
                                 std::vector<std::uint8_t> fallback, bool exact_high = false);
  // Ascending numbers and ranges, "0,3,10-19"; none when absent.
  std::vector<std::uint32_t> positions(std::string_view name);
  // One fraction in (0, 1] for each class, or one for all.
  std::array<float, 2> clip(std::string_view name, std::size_t n_classes,
                            std::array<float, 2> fallback);

  // What the setting `calibration` stands for; fails, and returns nullptr, without one.
  const Calibration* calibration();

 private:
  // The text of `name`; nullptr if there is nothing to read.
  const std::string* find(std::string_view name) const;
  void fail(std::string_view name, std::string_view found, std::string_view expected);
  void resolve(std::string_view name, std::string text) {
    resolved_[std::string(name)] = std::move(text);
  }

  const Settings& settings_;
  const Calibration* const calibration_;
  Settings resolved_;
  std::optional<Error> error_;
};

template <typename T>
T SettingReader::choice(std::string_view name, std::span<const Named<T>> choices, T fallback) {
  const std::string* text = find(name);
  std::string accepted;
  for (const Named<T>& choice : choices) {
    if (text != nullptr ? choice.name == *text : choice.value == fallback) {
      resolve(name, std::string(choice.name));
      return choice.value;
    }
    accepted += (accepted.empty() ? "" : ", ") + std::string(choice.name);
  }
  ZC_CHECK(text != nullptr);  // the table names every value
  fail(name, *text, "accepted: " + accepted);
  return fallback;
}

}  // namespace zipcache::policy
