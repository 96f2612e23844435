#include "policy/settings.h"

#include <algorithm>
#include <charconv>
#include <numeric>
#include <type_traits>

#include "policy/method.h"

namespace zipcache::policy {
namespace {

constexpr std::string_view kWidths = "2, 3, 4, 8";

// User text inside a message; control characters would break its one line.
std::string quoted(std::string_view text) {
  std::string printable(text);
  std::replace_if(
      printable.begin(), printable.end(),
      [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
  return "'" + printable + "'";
}

// The whole of `text` as a number, or nothing.
template <typename T>
std::optional<T> parse_number(std::string_view text) {
  T number{};
  const char* end = text.data() + text.size();
  const auto [stop, code] = std::from_chars(text.data(), end, number);
  if (code != std::errc{} || stop != end) {
    return std::nullopt;
  }
  return number;
}

// The comma-separated numbers of `text`, or nothing if one is malformed.
template <typename T>
std::optional<std::vector<T>> parse_list(std::string_view text) {
  std::vector<T> numbers;
  for (;;) {
    const std::size_t comma = text.find(',');
    const std::optional<T> number = parse_number<T>(text.substr(0, comma));
    if (!number) {
      return std::nullopt;
    }
    numbers.push_back(*number);
    if (comma == std::string_view::npos) {
      return numbers;
    }
    text.remove_prefix(comma + 1);
  }
}

// "30" -> 3000, "12.5" -> 1250: of percent, basis points; nothing if malformed, over 100 or finer
// than 0.01.
std::optional<std::uint32_t> parse_hundredths(std::string_view text) {
  const std::size_t point = text.find('.');
  const std::optional<std::uint32_t> whole = parse_number<std::uint32_t>(text.substr(0, point));
  if (!whole || *whole > 100) {
    return std::nullopt;
  }
  std::uint32_t hundredths = 0;
  if (point != std::string_view::npos) {
    const std::string_view decimals = text.substr(point + 1);
    const std::optional<std::uint32_t> digits = parse_number<std::uint32_t>(decimals);
    if (!digits || decimals.size() > 2) {
      return std::nullopt;
    }
    hundredths = decimals.size() == 1 ? *digits * 10 : *digits;
  }
  const std::uint32_t number = *whole * 100 + hundredths;
  return number <= 10000 ? std::optional(number) : std::nullopt;
}

// Levenshtein distance.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);  // distances of the prefix of `a` read so far
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t in_a = 1; in_a <= a.size(); ++in_a) {
    std::size_t diagonal = row[0];
    row[0] = in_a;
    for (std::size_t in_b = 1; in_b <= b.size(); ++in_b) {
      const std::size_t replaced = diagonal + (a[in_a - 1] == b[in_b - 1] ? 0 : 1);
      diagonal = row[in_b];
      row[in_b] = std::min({replaced, row[in_b] + 1, row[in_b - 1] + 1});
    }
  }
  return row.back();
}

bool is_known(std::string_view name) {
  return std::any_of(setting_words().begin(), setting_words().end(),
                     [name](const SettingHelp& help) { return help.name == name; });
}

// The known name most like `name`; empty if none is near enough to be meant.
std::string nearest_setting(std::string_view name) {
  constexpr std::size_t kMaxDistance = 3;
  std::string nearest;
  std::size_t least = std::min(kMaxDistance + 1, name.size());
  for (const SettingHelp& help : setting_words()) {
    const std::size_t distance = edit_distance(name, help.name);
    if (distance < least) {
      least = distance;
      nearest = help.name;
    }
  }
  return nearest;
}

// "a, b, c"
template <typename Names>
std::string list_of(const Names& names) {
  std::string list;
  for (const auto& name : names) {
    list += (list.empty() ? "" : ", ") + std::string(name);
  }
  return list;
}

template <typename T>
std::string numbers_text(std::span<const T> numbers) {
  std::string text;
  for (const T number : numbers) {
    if constexpr (std::is_floating_point_v<T>) {
      text += (text.empty() ? "" : ",") + float_text(number);
    } else {
      text += (text.empty() ? "" : ",") + std::to_string(number);
    }
  }
  return text;
}

}  // namespace

std::string percent_text(std::uint32_t hundredths) {
  std::string text = std::to_string(hundredths / 100);
  const std::uint32_t decimals = hundredths % 100;
  if (decimals != 0) {
    text += '.';
    text += static_cast<char>('0' + decimals / 10);
    if (decimals % 10 != 0) {
      text += static_cast<char>('0' + decimals % 10);
    }
  }
  return text;
}

std::string float_text(float value) {
  std::array<char, 32> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  return {buffer.data(), end};
}

const std::vector<SettingHelp>& setting_words() {
  static const std::vector<SettingHelp> kWords = {
      {"policy", list_of(method_names()),
       "what the cache does with its tokens: the table of policies"},
      {"mode", "default, paper, official",
       "where the defaults of zipcache come from: measured here, the paper, or the published code"},
      {"kv-bits", "0 or 2.2..4, two decimals",
       "bits per element that a block may take, parameters and masks included: chooses key-wide, "
       "key-salient and value-salient, 0 leaves them alone; staged tokens come on top"},
      {"key-bits", "HI,LO or one width, of 2, 3, 4, 8; HI of mikv also 16",
       "bits of salient and of other keys"},
      {"value-bits", "HI,LO or one width, of 2, 3, 4, 8; HI of mikv also 16",
       "bits of salient and of other values"},
      {"key-salient", "0..100 percent, two decimals", "share of the tokens whose keys are salient"},
      {"value-salient", "0..100 percent, two decimals",
       "share of the tokens whose values are salient"},
      {"key-clip", "HI,LO or one fraction, above 0 up to 1",
       "range kept of each set of keys that shares a scale; in zipcache 0.9 for 3 bits, 0.7 for 2, "
       "and all of it for wide channels"},
      {"value-clip", "HI,LO or one fraction, above 0 up to 1",
       "range kept of each set of values that shares a scale; in zipcache 0.75 for 2 bits"},
      {"key-wide", "0..100 percent, two decimals",
       "share of a head's key channels, those that would err most, that have key-wide-bits; in "
       "steps of 16 channels; 0 where no keys have 2 bits"},
      {"key-wide-bits", "2, 3, 4 or 8", "bits of those channels, for all tokens"},
      {"granularity", "channelwise+cst, channelwise+tokenwise, tokenwise, groupwise",
       "what shares a scale, for keys and for values"},
      {"group", "16..512 in steps of 16",
       "channels of a token that share a scale (uniform: with granularity groupwise); kivi and "
       "gear: also tokens of a channel, 0 for all of a block (gear); skvq: 0 for the largest up to "
       "128 that splits every head"},
      {"residual", "0 or a multiple of group up to 4096",
       "tokens that kivi keeps exact: keys are quantized so many at a time, values when so many "
       "newer ones are there"},
      {"value-params", "byte, half", "how a value token's scale and minimum are stored"},
      {"sinks", "0..4096", "first tokens of a sequence, never sealed"},
      {"hold", "0..65536",
       "newest tokens, not yet quantized; in uniform it fills up the sinks to a multiple of 32"},
      {"hold-share", "0..100 percent, two decimals",
       "most that are held, of a sequence's tokens beyond the first 512; 100 is no limit"},
      {"seal",
       "16..65536 in steps of 16; uniform in steps of 32, paper, official, gear, mikv and static "
       "of 1, h2o 1..65536",
       "staged tokens that start a quantization"},
      {"block",
       "0 or 16..65536 in steps of 16; uniform in steps of 32, paper, official, mikv and static "
       "of 1",
       "most tokens of one block, 0 for no limit"},
      {"append", "0 or 4..64",
       "fewest tokens that wait until they join the last block of their sequence; more do in a "
       "long one; 0: they wait for a block of their own"},
      {"staging-bits", "8, 16",
       "width of sinks and of tokens that wait, once their step is over; 16 is exact"},
      {"rank", "0..16",
       "of the low-rank term, per head of a block; at most 2 in blocks of decoded tokens"},
      {"outliers", "0..100 percent, two decimals",
       "share of each key channel and value token that is kept exact, with its place"},
      {"metric", "normalized, accumulated, official, random, locality, last-token, roco",
       "what makes a token salient; the mean of RoCo alone is normalized with probes all"},
      {"probes", "default, official, all, recent, random, last, special",
       "queries whose attention is measured; metric last-token has the last one, roco all"},
      {"probe-positions", "ascending numbers or ranges, 0,3,10-19; each below 16777216",
       "with probes special: where in each sequence the special tokens are (a cache sees no text)"},
      {"heavy", "0..100 percent, two decimals",
       "share of the tokens so far that h2o keeps for the attention they received"},
      {"recent", "0..100 percent, two decimals",
       "h2o: share of the tokens so far that are kept because they are the newest; mikv: share of "
       "the tokens quantized together that are salient because they are the newest"},
      {"balancer", "on, off", "divide keys by what their channel's queries make of them (MiKV)"},
      {"seed", "0..18446744073709551615", "chooses the random probes"},
      {"calibration", "FILE",
       "what zipcache calibrate -m MODEL -o FILE found out about the model's channels; static and "
       "skvq need it"},
  };
  return kWords;
}

const std::string* SettingReader::find(std::string_view name) const {
  if (error_) {
    return nullptr;
  }
  const auto found = settings_.find(std::string(name));
  return found == settings_.end() ? nullptr : &found->second;
}

void SettingReader::fail(std::string_view name, std::string_view found, std::string_view expected) {
  if (!error_) {
    error_ = invalid_argument(std::string(name) + ": found " + quoted(found) + ", " +
                              std::string(expected));
  }
}

void SettingReader::fail(std::string_view name, std::string_view message) {
  if (!error_) {
    error_ = invalid_argument(std::string(name) + ": " + std::string(message));
  }
}

void SettingReader::check_known() {
  for (const auto& [name, text] : settings_) {
    if (!is_known(name) && !error_) {
      const std::string nearest = nearest_setting(name);
      const std::string hint = nearest.empty() ? ";" : "; did you mean " + quoted(nearest) + "?";
      std::vector<std::string> known;
      for (const SettingHelp& help : setting_words()) {
        known.push_back(help.name);
      }
      error_ =
          invalid_argument("unknown setting " + quoted(name) + hint + " known: " + list_of(known));
    }
  }
}

void SettingReader::check_applies(std::string_view policy,
                                  const std::vector<std::string_view>& applicable) {
  for (const auto& [name, text] : settings_) {
    const bool applies = name == "policy" ||
                         std::find(applicable.begin(), applicable.end(), name) != applicable.end();
    if (!applies && !error_) {
      error_ = invalid_argument(name + ": does not apply to policy " + quoted(policy) +
                                ", which takes policy" + (applicable.empty() ? "" : ", ") +
                                list_of(applicable));
    }
  }
}

void SettingReader::reject(std::string_view name, std::string_view expected) {
  if (const std::string* text = find(name)) {
    fail(name, *text, expected);
  }
}

void SettingReader::override(std::string_view name, std::string_view expected) {
  reject(name, expected);
  resolved_.erase(std::string(name));
}

std::uint32_t SettingReader::count(std::string_view name, const CountRange& range,
                                   std::uint32_t fallback) {
  resolve(name, std::to_string(fallback));
  const std::string* text = find(name);
  if (text == nullptr) {
    return fallback;
  }
  resolve(name, *text);
  const std::optional<std::uint32_t> number = parse_number<std::uint32_t>(*text);
  if (number && *number >= range.min && *number <= range.max && *number % range.step == 0) {
    return *number;
  }
  if (number && *number == 0 && range.or_zero) {
    return 0;
  }
  fail(name, *text,
       "accepted: " + std::string(range.or_zero ? "0 or " : "") + std::to_string(range.min) + ".." +
           std::to_string(range.max) +
           (range.step == 1 ? "" : " in steps of " + std::to_string(range.step)));
  return fallback;
}

std::uint32_t SettingReader::hundredths(std::string_view name, const CountRange& range,
                                        std::uint32_t fallback) {
  resolve(name, percent_text(fallback));
  const std::string* text = find(name);
  if (text == nullptr) {
    return fallback;
  }
  const std::optional<std::uint32_t> number = parse_hundredths(*text);
  if (number &&
      ((*number >= range.min && *number <= range.max) || (*number == 0 && range.or_zero))) {
    resolve(name, percent_text(*number));
    return *number;
  }
  fail(name, *text,
       "accepted: " + std::string(range.or_zero ? "0 or " : "") + percent_text(range.min) + ".." +
           percent_text(range.max) + " with up to two decimals");
  return fallback;
}

std::uint64_t SettingReader::seed(std::string_view name, std::uint64_t fallback) {
  resolve(name, std::to_string(fallback));
  const std::string* text = find(name);
  if (text == nullptr) {
    return fallback;
  }
  resolve(name, *text);
  const std::optional<std::uint64_t> number = parse_number<std::uint64_t>(*text);
  if (!number) {
    fail(name, *text, "accepted: a whole number from 0 to 18446744073709551615");
  }
  return number.value_or(fallback);
}

const Calibration* SettingReader::calibration() {
  constexpr std::string_view kName = "calibration";
  if (calibration_ == nullptr) {
    reject(kName, "but no file was read");
    fail(kName,
         "missing, and this policy takes its channels' figures from it; make it with: "
         "zipcache calibrate -m MODEL -o FILE, then set calibration=FILE");
    return nullptr;
  }
  if (const std::string* text = find(kName)) {
    resolve(kName, *text);
  }
  return calibration_;
}

std::uint32_t SettingReader::percent(std::string_view name, std::uint32_t fallback_bp) {
  resolve(name, percent_text(fallback_bp));
  const std::string* text = find(name);
  if (text == nullptr) {
    return fallback_bp;
  }
  const std::optional<std::uint32_t> basis_points = parse_hundredths(*text);
  if (!basis_points) {
    fail(name, *text, "accepted: percent from 0 to 100 with up to two decimals");
    return fallback_bp;
  }
  resolve(name, percent_text(*basis_points));
  return *basis_points;
}

std::vector<std::uint8_t> SettingReader::bits(std::string_view name, std::size_t max_classes,
                                              std::vector<std::uint8_t> fallback, bool exact_high) {
  resolve(name, numbers_text<std::uint8_t>(fallback));
  const std::string* text = find(name);
  if (text == nullptr) {
    return fallback;
  }
  const auto widths = parse_list<std::uint8_t>(*text);
  const auto is_width = [&](const std::uint8_t& width) {
    return format::is_code_width(width) ||
           (exact_high && widths->size() == 2 && &width == widths->data() &&
            width == format::kExactBits);
  };
  if (!widths || widths->size() > max_classes ||
      !std::all_of(widths->begin(), widths->end(), is_width)) {
    fail(name, *text,
         "accepted widths are " + std::string(kWidths) + (exact_high ? " and for HI 16" : "") +
             (max_classes == 1 ? "; one for all tokens" : " as HI or HI,LO"));
    return fallback;
  }
  if (widths->size() == 2 && (*widths)[0] < (*widths)[1]) {
    fail(name, *text, "but salient tokens (HI) can't have fewer bits than the others (LO)");
    return fallback;
  }
  resolve(name, numbers_text<std::uint8_t>(*widths));
  return *widths;
}

std::vector<std::uint32_t> SettingReader::positions(std::string_view name) {
  constexpr std::uint32_t kEnd = 1u << 24;
  const std::string* text = find(name);
  if (text == nullptr) {
    return {};
  }
  std::vector<std::uint32_t> all;
  std::string_view rest = *text;
  bool more = true;
  while (more) {
    const std::size_t comma = rest.find(',');
    const std::string_view item = rest.substr(0, comma);
    const std::size_t dash = item.find('-');
    const auto first = parse_number<std::uint32_t>(item.substr(0, dash));
    const auto last =
        dash == std::string_view::npos ? first : parse_number<std::uint32_t>(item.substr(dash + 1));
    if (!first || !last || *first > *last || *last >= kEnd ||
        (!all.empty() && *first <= all.back())) {
      fail(name, *text, "accepted: ascending numbers and ranges below 16777216, as 0,3,10-19");
      return {};
    }
    for (std::uint32_t position = *first; position <= *last; ++position) {
      all.push_back(position);
    }
    more = comma != std::string_view::npos;
    rest.remove_prefix(more ? comma + 1 : 0);
  }
  resolve(name, *text);
  return all;
}

std::array<float, 2> SettingReader::clip(std::string_view name, std::size_t n_classes,
                                         std::array<float, 2> fallback) {
  resolve(name, numbers_text<float>(std::span(fallback).first(n_classes)));
  const std::string* text = find(name);
  if (text == nullptr) {
    return fallback;
  }
  const auto fractions = parse_list<float>(*text);
  const auto in_range = [](float fraction) { return fraction > 0.0f && fraction <= 1.0f; };
  if (!fractions || fractions->size() > n_classes ||
      !std::all_of(fractions->begin(), fractions->end(), in_range)) {
    fail(name, *text,
         n_classes == 1 ? "accepted: one fraction above 0 and up to 1"
                        : "accepted: fractions above 0 and up to 1 as HI,LO or one for both");
    return fallback;
  }
  const std::array<float, 2> clip{fractions->front(), fractions->back()};
  resolve(name, numbers_text<float>(std::span(clip).first(n_classes)));
  return clip;
}

}  // namespace zipcache::policy
