#include "cli/cache_report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace zipcache::cli {
namespace {

double mib(std::size_t bytes) { return double(bytes) / (1 << 20); }

std::string part_row(const char* name, std::size_t bytes, const CacheReport& report,
                     const char* meaning) {
  const double share = report.fp16_bytes == 0 ? 0.0 : double(bytes) / double(report.fp16_bytes);
  return fmt::format("  {:<8} {:>9.2f} MiB {:>6.1f} %  {}\n", name, mib(bytes), 100.0 * share,
                     meaning);
}

}  // namespace

Expected<CacheReport> parse_report(const std::string& json) {
  try {
    const auto parsed = nlohmann::json::parse(json);
    const auto& bytes = parsed.at("bytes");
    CacheReport report;
    report.policy = parsed.at("policy");
    report.isa = parsed.at("isa");
    report.bytes = {.codes = bytes.at("codes"),
                    .params = bytes.at("params"),
                    .masks = bytes.at("masks"),
                    .staging = bytes.at("staging"),
                    .slack = bytes.at("slack"),
                    .total = bytes.at("total")};
    report.fp16_bytes = parsed.at("fp16_bytes");
    report.ratio = parsed.at("ratio");
    report.bits_per_element = parsed.at("bits_per_element");
    report.live_tokens = parsed.at("live_tokens");
    report.policy_seconds = parsed.at("policy_seconds");
    return report;
  } catch (const nlohmann::json::exception& error) {
    return corrupt(std::string("the plug-in's report is not understood: ") + error.what());
  }
}

Expected<policy::Calibration> parse_calibration_report(const std::string& json) {
  try {
    return policy::parse_calibration(nlohmann::json::parse(json).at("calibration").dump());
  } catch (const nlohmann::json::exception& error) {
    return corrupt(std::string("the plug-in's report is not understood: ") + error.what());
  }
}

CacheReport plain_report(std::size_t fp16_bytes, std::uint64_t live_tokens) {
  return {.policy = "llama.cpp's own FP16 cache",
          .isa = {},
          .bytes = {.staging = fp16_bytes, .total = fp16_bytes},
          .fp16_bytes = fp16_bytes,
          .ratio = 1.0,
          .bits_per_element = 16.0,
          .live_tokens = live_tokens};
}

std::string to_table(const CacheReport& report, const RunStatistics& run) {
  const CacheBytes& bytes = report.bytes;
  std::string table = fmt::format("KV cache of {} tokens; {}\n", report.live_tokens, report.policy);
  if (!report.isa.empty()) {
    table += part_row("codes", bytes.codes, report, "quantized keys and values");
    table += part_row("params", bytes.params, report, "scales, minima, channel factors");
    table += part_row("masks", bytes.masks, report, "salient tokens, cell maps, descriptors");
    table += part_row("staging", bytes.staging, report, "tokens in no block yet");
    table += part_row("slack", bytes.slack, report, "allocated, not in use");
  }
  table += part_row("total", bytes.total, report, "all of it");
  table += part_row("FP16", report.fp16_bytes, report, "the same tokens uncompressed");
  table += fmt::format("  {:.2f}x smaller, {:.2f} bits per element\n", report.ratio,
                       report.bits_per_element);
  table += fmt::format("prefill {:.1f} tok/s ({} tokens), decode {:.1f} tok/s ({} tokens), {} {}",
                       run.prefill_tok_s(), run.n_prompt, run.decode_tok_s(), run.n_generated,
                       run.n_threads, run.n_threads == 1 ? "thread" : "threads");
  return table + (report.isa.empty() ? "\n" : ", " + report.isa + "\n");
}

std::string to_json(const CacheReport& report, const RunStatistics& run) {
  const CacheBytes& bytes = report.bytes;
  const nlohmann::ordered_json json = {{"model", run.model},
                                       {"policy", report.policy},
                                       {"n_prompt", run.n_prompt},
                                       {"n_generated", run.n_generated},
                                       {"seed", run.seed},
                                       {"bytes",
                                        {{"codes", bytes.codes},
                                         {"params", bytes.params},
                                         {"masks", bytes.masks},
                                         {"staging", bytes.staging},
                                         {"slack", bytes.slack},
                                         {"total", bytes.total}}},
                                       {"fp16_bytes", report.fp16_bytes},
                                       {"ratio", report.ratio},
                                       {"bits_per_element", report.bits_per_element},
                                       {"prefill_tok_s", run.prefill_tok_s()},
                                       {"decode_tok_s", run.decode_tok_s()},
                                       {"isa", report.isa},
                                       {"threads", run.n_threads}};
  return json.dump(2) + "\n";
}

}  // namespace zipcache::cli
