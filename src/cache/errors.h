// The ways in which a cache fails to grow, as messages.
#pragma once

#include <cstddef>
#include <string>

#include "base/expected.h"
#include "cache/bytes.h"
#include "policy/policy.h"

namespace zipcache::cache {

inline Error over_budget(const Budget& budget, std::size_t bytes) {
  return out_of_memory("KV cache is full: " + std::to_string(bytes) + " more bytes wanted, " +
                       std::to_string(budget.used()) + " of " + std::to_string(budget.limit()) +
                       " in use; raise the limit or shorten the context");
}

inline Error no_memory(std::size_t bytes) {
  return out_of_memory("KV cache could not get " + std::to_string(bytes) +
                       " bytes from the system; shorten the context");
}

}  // namespace zipcache::cache
