// How answers are compared with what was expected. The LongBench measures follow its published
// metrics; ROUGE-L is taken over the whole text as one sentence.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace zipcache::eval {

// Numbers in a text: "-1,234.50" is -1234.5. Digits of words ("x2") do not count.
std::vector<double> numbers_in(std::string_view text);
// What a chain of thought ends with: the number after the last "answer is" or "####", else the last
// number of the text.
std::optional<double> final_number(std::string_view text);

// Lower case, without punctuation and articles, split at spaces.
std::vector<std::string> answer_words(std::string_view text);

// 0 to 1. Harmonic mean of precision and recall of answer_words().
double f1_score(std::string_view prediction, std::string_view truth);
// F-measure of the longest common subsequence of words.
double rouge_l(std::string_view prediction, std::string_view truth);
// 1 / (number of classes that the prediction names), if it names the right one.
double classification_score(std::string_view prediction, std::string_view truth,
                            std::span<const std::string> classes);
// Share of the numbers in the prediction that are right; `truth` is "Paragraph 7" or "7".
double number_share(std::string_view prediction, std::string_view truth);
// Similarity (2 * common subsequence / both lengths, in whole percent) of the truth and the first
// line of the prediction that is no comment and no fence.
double code_similarity(std::string_view prediction, std::string_view truth);

// The text up to the first line end, leading ones skipped.
std::string_view first_line(std::string_view text);

}  // namespace zipcache::eval
