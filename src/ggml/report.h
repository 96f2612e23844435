// What the KV caches of this process hold: JSON on request, and one table when the last of them is
// freed. A table made then would often be empty, so the last bytes before a clear are remembered.
//
// Locks: this module's before a buffer's.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "cache/bytes.h"

namespace zipcache::ggml {

class KvBuffer;

void report_opened(KvBuffer* buffer);
void report_clearing(KvBuffer* buffer);  // about to be cleared
void report_closed(KvBuffer* buffer);    // about to be freed

// {"policy", "bytes": {"codes", "params", "masks", "staging", "slack", "total"}, "fp16_bytes",
//  "ratio", "bits_per_element", "live_tokens", "sealed_share", "policy_seconds", "isa",
//  "version"} of all KV caches alive now; of those freed last when there are none. Where they are
// observed also "calibration": the object of policy/calibration.h, without an origin.
std::string report_json();

// {"codes", "params", "masks", "staging", "slack", "total"}: the "bytes" of every report.
nlohmann::ordered_json bytes_json(const cache::ByteCount& bytes);

}  // namespace zipcache::ggml
