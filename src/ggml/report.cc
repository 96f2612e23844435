#include "ggml/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>

#include "ggml/buffer.h"
#include "ggml/log.h"
#include "ggml/registry.h"

namespace zipcache::ggml {
namespace {

struct Snapshot {
  cache::ByteCount bytes;
  std::uint64_t live_tokens = 0;
  double policy_seconds = 0.0;
  std::size_t n_layers = 0;
  std::string policy;
  std::vector<policy::LayerCalibration> channels;

  bool empty() const { return bytes.live_tokens == 0; }
  Snapshot& operator+=(const Snapshot& other) {
    bytes += other.bytes;
    live_tokens = std::max(live_tokens, other.live_tokens);  // caches of one model see the same
    policy_seconds += other.policy_seconds;
    n_layers += other.n_layers;
    policy = other.policy;
    channels.insert(channels.end(), other.channels.begin(), other.channels.end());
    return *this;
  }
};

struct State {
  std::mutex mutex;
  std::map<KvBuffer*, Snapshot> open;  // with what each held when it was last cleared
  Snapshot closed;                     // sum of the freed ones since there were none
};

// Never destroyed: a host may free its contexts from destructors of its own globals.
State& state() {
  static auto* const kState = new State;
  return *kState;
}

Snapshot look_at(KvBuffer* buffer) {
  const std::lock_guard lock(buffer->mutex());
  return {buffer->bytes(),
          buffer->live_tokens(),
          buffer->policy_seconds(),
          buffer->n_layers(),
          policy::describe(*buffer->settings().policy),
          buffer->channels()};
}

std::string to_json(const Snapshot& seen) {
  const cache::ByteCount& bytes = seen.bytes;
  const double sealed_share =
      bytes.live_tokens == 0 ? 0.0 : double(bytes.sealed_tokens) / double(bytes.live_tokens);
  nlohmann::ordered_json json = {{"policy", seen.policy},
                                 {"bytes", bytes_json(bytes)},
                                 {"fp16_bytes", bytes.fp16},
                                 {"ratio", bytes.ratio()},
                                 {"bits_per_element", bytes.bits_per_element()},
                                 {"live_tokens", seen.live_tokens},
                                 {"sealed_share", sealed_share},
                                 {"policy_seconds", seen.policy_seconds},
                                 {"isa", kernel_table().isa},
                                 {"version", ZIPCACHE_VERSION}};
  if (!seen.channels.empty()) {
    policy::Calibration calibration;
    calibration.layers = seen.channels;
    std::sort(calibration.layers.begin(), calibration.layers.end(),
              [](const auto& a, const auto& b) { return a.layer < b.layer; });
    json["calibration"] = nlohmann::ordered_json::parse(policy::calibration_text(calibration));
  }
  return json.dump();
}

std::string to_table(const Snapshot& seen) {
  const auto mib = [](std::size_t bytes) { return double(bytes) / (1 << 20); };
  const cache::ByteCount& bytes = seen.bytes;
  return fmt::format(
      "zipcache: {} tokens x {} layers hold {:.2f} MiB, as fp16 {:.2f} MiB: ratio {:.2f}, {:.2f} "
      "bits per element\n"
      "zipcache:   codes {:.2f} + params {:.2f} + masks {:.2f} + staging {:.2f} + slack {:.2f} "
      "MiB; {}; {}\n",
      seen.live_tokens, seen.n_layers, mib(bytes.total()), mib(bytes.fp16), bytes.ratio(),
      bytes.bits_per_element(), mib(bytes.codes), mib(bytes.params), mib(bytes.masks),
      mib(bytes.staging), mib(bytes.slack), seen.policy, kernel_table().isa);
}

void publish(const Snapshot& seen, const std::string& destination) {
  if (seen.empty() || destination == "0") {
    return;
  }
  if (destination == "stderr") {
    std::fputs(to_table(seen).c_str(), stderr);
    return;
  }
  std::ofstream file(destination);
  file << to_json(seen) << '\n';
  if (!file.flush()) {
    log_error("can't write the report to " + destination);
  }
}

}  // namespace

void report_opened(KvBuffer* buffer) {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  if (known.open.empty()) {
    known.closed = {};
  }
  known.open[buffer];
}

void report_clearing(KvBuffer* buffer) {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  const Snapshot seen = look_at(buffer);
  // Warm-up and probes of the host leave a few tokens, which must not stand for what came before.
  Snapshot& last = known.open[buffer];
  if (seen.bytes.live_tokens >= last.bytes.live_tokens) {
    last = seen;
  }
}

void report_closed(KvBuffer* buffer) {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  const Snapshot seen = look_at(buffer);
  const Snapshot last = known.open[buffer];
  known.open.erase(buffer);
  known.closed += seen.empty() ? last : seen;
  if (known.open.empty()) {
    publish(known.closed, buffer->settings().report);
  }
}

nlohmann::ordered_json bytes_json(const cache::ByteCount& bytes) {
  return {{"codes", bytes.codes},     {"params", bytes.params}, {"masks", bytes.masks},
          {"staging", bytes.staging}, {"slack", bytes.slack},   {"total", bytes.total()}};
}

std::string report_json() {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  if (known.open.empty()) {
    return to_json(known.closed);
  }
  Snapshot sum;
  for (const auto& [buffer, last] : known.open) {
    sum += look_at(buffer);
  }
  return to_json(sum);
}

}  // namespace zipcache::ggml
