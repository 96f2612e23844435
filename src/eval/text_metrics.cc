#include "eval/text_metrics.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <map>
#include <utility>

namespace zipcache::eval {
namespace {

bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }
bool is_letter(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0; }

template <typename Sequence>
std::size_t common_subsequence(const Sequence& a, const Sequence& b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (const auto& in_a : a) {
    std::size_t diagonal = 0;
    for (std::size_t i = 0; i < b.size(); ++i) {
      const std::size_t above = row[i + 1];
      row[i + 1] = in_a == b[i] ? diagonal + 1 : std::max(above, row[i]);
      diagonal = above;
    }
  }
  return row.back();
}

double harmonic_mean(double common, std::size_t n_prediction, std::size_t n_truth) {
  return common == 0 ? 0 : 2 * common / double(n_prediction + n_truth);
}

std::vector<std::string> split_words(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (const char c : text) {
    if (std::isspace(static_cast<unsigned char>(c)) == 0) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(std::exchange(word, {}));
    }
  }
  if (!word.empty()) {
    words.push_back(word);
  }
  return words;
}

}  // namespace

std::vector<double> numbers_in(std::string_view text) {
  std::vector<double> numbers;
  for (std::size_t at = 0; at < text.size();) {
    if (!is_digit(text[at]) || (at > 0 && is_letter(text[at - 1]))) {
      const bool is_word = is_digit(text[at]);
      ++at;
      while (is_word && at < text.size() && is_digit(text[at])) {
        ++at;
      }
      continue;
    }
    const bool is_negative = at > 0 && text[at - 1] == '-' &&
                             (at < 2 || (!is_digit(text[at - 2]) && !is_letter(text[at - 2])));
    std::string digits = is_negative ? "-" : "";
    bool has_point = false;
    for (; at < text.size(); ++at) {
      const bool digit_follows = at + 1 < text.size() && is_digit(text[at + 1]);
      if (is_digit(text[at])) {
        digits += text[at];
      } else if (text[at] == '.' && digit_follows && !has_point) {
        has_point = true;
        digits += '.';
      } else if (text[at] != ',' || !digit_follows) {
        break;
      }
    }
    double number = 0;
    std::from_chars(digits.data(), digits.data() + digits.size(), number);
    numbers.push_back(number);
  }
  return numbers;
}

std::optional<double> final_number(std::string_view text) {
  for (const std::string_view mark : {"####", "answer is"}) {
    if (const std::size_t at = text.rfind(mark); at != std::string_view::npos) {
      const std::vector<double> after = numbers_in(text.substr(at + mark.size()));
      if (!after.empty()) {
        return after.front();
      }
    }
  }
  const std::vector<double> all = numbers_in(text);
  return all.empty() ? std::nullopt : std::optional(all.back());
}

std::vector<std::string> answer_words(std::string_view text) {
  std::string plain;
  for (const char c : text) {
    if (std::ispunct(static_cast<unsigned char>(c)) == 0) {
      plain += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  std::vector<std::string> words = split_words(plain);
  std::erase_if(
      words, [](const std::string& word) { return word == "a" || word == "an" || word == "the"; });
  return words;
}

double f1_score(std::string_view prediction, std::string_view truth) {
  const std::vector<std::string> found = answer_words(prediction), wanted = answer_words(truth);
  std::map<std::string, int> left;
  for (const std::string& word : wanted) {
    ++left[word];
  }
  const auto common = std::count_if(found.begin(), found.end(),
                                    [&](const std::string& word) { return left[word]-- > 0; });
  return harmonic_mean(double(common), found.size(), wanted.size());
}

double rouge_l(std::string_view prediction, std::string_view truth) {
  const std::vector<std::string> found = split_words(prediction), wanted = split_words(truth);
  return harmonic_mean(double(common_subsequence(found, wanted)), found.size(), wanted.size());
}

double classification_score(std::string_view prediction, std::string_view truth,
                            std::span<const std::string> classes) {
  std::size_t n_named = 0;
  bool is_right = false;
  for (const std::string& name : classes) {
    // A name inside the right name ("Entity" in "Entity, animal") is not another answer.
    const bool is_part = name != truth && truth.find(name) != std::string_view::npos;
    if (prediction.find(name) != std::string_view::npos && !is_part) {
      ++n_named;
      is_right |= name == truth;
    }
  }
  return is_right ? 1.0 / double(n_named) : 0;
}

double number_share(std::string_view prediction, std::string_view truth) {
  const std::vector<double> found = numbers_in(prediction), wanted = numbers_in(truth);
  if (found.empty() || wanted.empty()) {
    return 0;
  }
  const auto n_right = std::count(found.begin(), found.end(), wanted.front());
  return double(n_right) / double(found.size());
}

double code_similarity(std::string_view prediction, std::string_view truth) {
  std::string_view line, rest = prediction;
  rest.remove_prefix(std::min(rest.find_first_not_of('\n'), rest.size()));
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view candidate = rest.substr(0, end);
    if (candidate.find_first_of("`#") == std::string_view::npos &&
        candidate.find("//") == std::string_view::npos) {
      line = candidate;
      break;
    }
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  const double common = double(common_subsequence(line, truth));
  return std::round(100 * harmonic_mean(common, line.size(), truth.size())) / 100;
}

std::string_view first_line(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of('\n'), text.size()));
  return text.substr(0, text.find('\n'));
}

}  // namespace zipcache::eval
