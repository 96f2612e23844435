#include "cli/utf8_stream.h"

#include <gtest/gtest.h>

namespace zipcache::cli {
namespace {

TEST(Utf8Stream, KeepsACharacterUntilItIsComplete) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("a\xE2\x82"), "a");
  EXPECT_EQ(stream.push("\xAC!"), "\xE2\x82\xAC!");
  EXPECT_EQ(stream.finish(), "");
}

TEST(Utf8Stream, TakesFourByteCharactersByteByByte) {
  const std::string_view face = "\xF0\x9F\x99\x82";
  Utf8Stream stream;
  std::string out;
  for (const char byte : face) {
    out += stream.push({&byte, 1});
    EXPECT_TRUE(out.empty() || out == face);
  }
  EXPECT_EQ(out, face);
}

TEST(Utf8Stream, ReplacesWhatIsNoCharacter) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("\x80z"), "\xEF\xBF\xBDz");                // a continuation without a lead
  EXPECT_EQ(stream.push("\xC0\xAF"), "\xEF\xBF\xBD\xEF\xBF\xBD");  // overlong '/'
  EXPECT_EQ(stream.push("\xE2\x82z"), "\xEF\xBF\xBDz");  // cut short by an ordinary letter
  EXPECT_EQ(stream.push("\xED\xA0\x80"), "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD");  // a surrogate
}

TEST(Utf8Stream, FinishReplacesTheRest) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("x\xF0\x9F"), "x");
  EXPECT_EQ(stream.finish(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.finish(), "");
}

TEST(WithoutPartialCharacter, CutsOnlyAnIncompleteEnd) {
  EXPECT_EQ(without_partial_character(""), "");
  EXPECT_EQ(without_partial_character("abc"), "abc");
  EXPECT_EQ(without_partial_character("a\xE2\x82\xAC"), "a\xE2\x82\xAC");
  EXPECT_EQ(without_partial_character("a\xE2\x82"), "a");
  EXPECT_EQ(without_partial_character("a\xE2"), "a");
  EXPECT_EQ(without_partial_character("a\xF0\x9F\x99"), "a");
}

}  // namespace
}  // namespace zipcache::cli
