#include "eval/text_metrics.h"

#include <gtest/gtest.h>

namespace zipcache::eval {
namespace {

using Numbers = std::vector<double>;

TEST(NumbersIn, FindsThemAsWritten) {
  EXPECT_EQ(numbers_in("it is <2416>."), Numbers({2416}));
  EXPECT_EQ(numbers_in("$1,234.50 and -3, then 7."), Numbers({1234.5, -3, 7}));
  EXPECT_EQ(numbers_in("16-3 = 13"), Numbers({16, 3, 13}));
  EXPECT_EQ(numbers_in("x2 v12b 5"), Numbers({5}));
  EXPECT_EQ(numbers_in("1.2.3"), Numbers({1.2, 3}));
  EXPECT_EQ(numbers_in(""), Numbers());
}

TEST(FinalNumber, PrefersTheMarkedOne) {
  EXPECT_EQ(final_number("2 + 3 = 5. The answer is $5. Question 9"), 5);
  EXPECT_EQ(final_number("9 * 2 = $<<9*2=18>>18\n#### 1,800"), 1800);
  EXPECT_EQ(final_number("so 3 and 4"), 4);
  EXPECT_EQ(final_number("the answer is unknown, 4"), 4);
  EXPECT_EQ(final_number("none"), std::nullopt);
}

TEST(F1, OfWordsWithoutArticles) {
  EXPECT_DOUBLE_EQ(f1_score("The cat, sat!", "cat sat"), 1);
  EXPECT_DOUBLE_EQ(f1_score("a big cat", "cat"), 2 * 0.5 * 1 / 1.5);
  EXPECT_DOUBLE_EQ(f1_score("cat cat", "cat"), 2 * 0.5 * 1 / 1.5);
  EXPECT_DOUBLE_EQ(f1_score("", "cat"), 0);
}

TEST(RougeL, OfTheLongestCommonSubsequence) {
  EXPECT_DOUBLE_EQ(rouge_l("a b c d", "a x c d"), 0.75);
  EXPECT_DOUBLE_EQ(rouge_l("d c b a", "a b c d"), 0.25);
  EXPECT_DOUBLE_EQ(rouge_l("", "a"), 0);
}

TEST(Classification, SharesAmongTheClassesNamed) {
  const std::vector<std::string> classes{"Animal", "City", "Animal body"};
  EXPECT_DOUBLE_EQ(classification_score("City", "City", classes), 1);
  EXPECT_DOUBLE_EQ(classification_score("City or Animal", "City", classes), 0.5);
  EXPECT_DOUBLE_EQ(classification_score("Animal body", "Animal body", classes), 1);
  EXPECT_DOUBLE_EQ(classification_score("Animal", "City", classes), 0);
}

TEST(NumberShare, CountsRightNumbers) {
  EXPECT_DOUBLE_EQ(number_share("Paragraph 7", "Paragraph 7"), 1);
  EXPECT_DOUBLE_EQ(number_share("7 or 8", "Paragraph 7"), 0.5);
  EXPECT_DOUBLE_EQ(number_share("none", "3"), 0);
}

TEST(CodeSimilarity, OfTheFirstLineOfCode) {
  EXPECT_DOUBLE_EQ(code_similarity("\n# comment\nreturn x\ny", "return x"), 1);
  EXPECT_DOUBLE_EQ(code_similarity("```\nabcd", "abxd"), 0.75);
  EXPECT_DOUBLE_EQ(code_similarity("// only a comment", "return x"), 0);
}

TEST(FirstLine, SkipsEmptyOnes) {
  EXPECT_EQ(first_line("\n\nyes\nno"), "yes");
  EXPECT_EQ(first_line("\n"), "");
}

}  // namespace
}  // namespace zipcache::eval
