// Expected<T>: a value or one line that says what was found, what is supported and what to do.
// Returned by everything that bytes, configuration or users can reach.
#pragma once

#include <string>
#include <utility>
#include <variant>

#include "base/check.h"

namespace zipcache {

enum class ErrorCode {
  kInvalidArgument,  // a setting, shape or call that makes no sense
  kUnsupported,      // makes sense, but this build can't do it
  kCorrupt,          // bytes that are not what they claim to be
  kOutOfMemory,      // the cache could not grow
};

struct Error {
  ErrorCode code = ErrorCode::kInvalidArgument;
  std::string message;  // one line, no trailing newline
};

template <typename T>
class [[nodiscard]] Expected {
 public:
  Expected(T value) : state_(std::move(value)) {}      // NOLINT(google-explicit-constructor)
  Expected(Error error) : state_(std::move(error)) {}  // NOLINT(google-explicit-constructor)

  explicit operator bool() const { return std::holds_alternative<T>(state_); }

  // REQUIRES: *this holds a value.
  T& value() & {
    ZC_CHECK(*this);
    return std::get<T>(state_);
  }
  const T& value() const& {
    ZC_CHECK(*this);
    return std::get<T>(state_);
  }
  T&& value() && {
    ZC_CHECK(*this);
    return std::get<T>(std::move(state_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  // REQUIRES: *this holds an error.
  const Error& error() const {
    ZC_CHECK(!*this);
    return std::get<Error>(state_);
  }

 private:
  std::variant<T, Error> state_;
};

// The result of an action without a value.
using Status = Expected<std::monostate>;
inline Status ok_status() { return std::monostate{}; }

inline Error invalid_argument(std::string message) {
  return {ErrorCode::kInvalidArgument, std::move(message)};
}
inline Error unsupported(std::string message) {
  return {ErrorCode::kUnsupported, std::move(message)};
}
inline Error corrupt(std::string message) { return {ErrorCode::kCorrupt, std::move(message)}; }
inline Error out_of_memory(std::string message) {
  return {ErrorCode::kOutOfMemory, std::move(message)};
}

}  // namespace zipcache
