// Checks for broken contracts (programming errors). Input from bytes, configuration or users never
// reaches a check: it is answered with Expected<T> (base/expected.h).
#pragma once

#include <stdexcept>
#include <string>

namespace zipcache {

// Thrown by ZC_CHECK; carries file and line. Never crosses a C boundary.
class ContractViolation : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

[[noreturn]] inline void contract_violated(const char* file, int line, const char* condition) {
  throw ContractViolation(std::string(file) + ":" + std::to_string(line) +
                          ": broken contract: " + condition);
}

}  // namespace zipcache

#define ZC_CHECK(condition)                                          \
  do {                                                               \
    if (!(condition)) [[unlikely]]                                   \
      ::zipcache::contract_violated(__FILE__, __LINE__, #condition); \
  } while (0)
