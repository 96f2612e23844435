#include "eval/results.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "eval/divergence.h"
#include "eval/statistics.h"

namespace zipcache::eval {
namespace {

constexpr std::uint64_t kBootstrapSeed = 0;
constexpr std::size_t kTextBlock = 64;  // neighbouring positions that are resampled together

const Sample& sample_of(const Journal& journal, const std::string& policy,
                        const std::string& item) {
  const Sample* sample = journal.find(policy, item);
  ZC_CHECK(sample != nullptr);
  return *sample;
}

// Bytes, ratio and time over all samples of a policy.
void add_cost(Record& record, const std::vector<const Sample*>& samples) {
  cache::ByteCount bytes;
  std::size_t n_tokens = 0;
  double seconds = 0;
  for (const Sample* sample : samples) {
    bytes += sample->bytes;
    n_tokens += sample->n_tokens;
    seconds += sample->cpu_seconds;
  }
  record["n_items"] = samples.size();
  record["n_cache_tokens"] = n_tokens;
  record["bits_per_element"] = bytes.bits_per_element();
  record["ratio"] = bytes.ratio();
  record["bytes"] = to_json(bytes);
  record["fp16_bytes"] = bytes.fp16;
  record["cpu_seconds"] = std::round(seconds * 10) / 10;
}

std::vector<PositionResult> all_positions(const std::vector<const Sample*>& samples) {
  std::vector<PositionResult> positions;
  for (const Sample* sample : samples) {
    positions.insert(positions.end(), sample->positions.begin(), sample->positions.end());
  }
  return positions;
}

void add_divergence(Record& record, const std::vector<PositionResult>& positions) {
  const DivergenceSummary s = summarize(positions);
  record["n_tokens"] = s.n;
  record["ppl"] = s.ppl.mean;
  record["ppl_error"] = s.ppl.error;
  record["ppl_fp16"] = s.ppl_base.mean;
  record["ln_ppl_ratio"] = s.ln_ppl_ratio.mean;
  record["ln_ppl_ratio_error"] = s.ln_ppl_ratio.error;
  record["kld_mean"] = s.kld.mean;
  record["kld_mean_error"] = s.kld.error;
  record["kld_median"] = percentile(s.sorted_kld, 0.5);
  record["kld_p99"] = percentile(s.sorted_kld, 0.99);
  record["kld_p999"] = percentile(s.sorted_kld, 0.999);
  record["kld_max"] = s.sorted_kld.back();
  record["p_diff_rms"] = s.p_diff_rms.mean;
  record["same_top"] = s.same_top.mean;
  record["same_top_error"] = s.same_top.error;
  std::vector<double> klds;
  for (const PositionResult& position : positions) {
    klds.push_back(position.kld);
  }
  const Interval ci = bootstrap_mean(klds, kTextBlock, kBootstrapSeed);
  record["ci95"] = {ci.low, ci.high};
}

// Two policies at the same positions: the difference of their mean KLD, this one's minus each
// other's, with its interval.
Record compare_positions(const std::vector<PositionResult>& mine,
                         const std::vector<PositionResult>& theirs) {
  std::vector<double> differences;
  for (std::size_t i = 0; i < mine.size(); ++i) {
    differences.push_back(double(mine[i].kld) - double(theirs[i].kld));
  }
  const Interval ci = bootstrap_mean(differences, kTextBlock, kBootstrapSeed);
  return {{"kld_difference", estimate_mean(differences).mean}, {"ci95", {ci.low, ci.high}}};
}

bool is_binary(const std::vector<double>& scores) {
  return std::all_of(scores.begin(), scores.end(),
                     [](double score) { return score == 0 || score == 1; });
}

// Two policies on the same items: difference of mean scores and, for right-or-wrong scores,
// McNemar's test.
Record compare_scores(const std::vector<double>& mine, const std::vector<double>& theirs) {
  std::vector<double> differences;
  std::size_t only_mine = 0, only_theirs = 0;
  for (std::size_t i = 0; i < mine.size(); ++i) {
    differences.push_back(mine[i] - theirs[i]);
    only_mine += mine[i] > theirs[i] ? 1 : 0;
    only_theirs += mine[i] < theirs[i] ? 1 : 0;
  }
  const Interval ci = bootstrap_mean(differences, /*block=*/1, kBootstrapSeed);
  Record record = {{"score_difference", estimate_mean(differences).mean},
                   {"ci95", {ci.low, ci.high}},
                   {"better", only_mine},
                   {"worse", only_theirs}};
  if (is_binary(mine) && is_binary(theirs)) {
    record["mcnemar_p"] = mcnemar_p(only_mine, only_theirs);
  }
  return record;
}

std::string cell(const Record& record, const char* key, const char* format) {
  const auto found = record.find(key);
  return found == record.end() || !found->is_number()
             ? "-"
             : fmt::format(fmt::runtime(format), found->get<double>());
}

std::string with_error(const Record& record, const char* key, const char* error_key,
                       const char* format) {
  return cell(record, key, format) + " ± " + cell(record, error_key, format);
}

std::string row(const std::vector<std::string>& cells) {
  return fmt::format("| {} |\n", fmt::join(cells, " | "));
}

std::string head(const std::vector<std::string>& columns) {
  std::string rule = "|";
  for (std::size_t i = 0; i < columns.size(); ++i) {
    rule += "---|";
  }
  return row(columns) + rule + "\n";
}

std::string window_table(const std::vector<Record>& records) {
  std::string table = head({"cache", "bits/element", "smaller", "mean KLD", "median", "99.9 %",
                            "PPL", "ln(PPL/PPL fp16)", "same top token", "CPU s"});
  for (const Record& record : records) {
    table += row({fmt::format("`{}`", record.at("policy").get<std::string>()),
                  cell(record, "bits_per_element", "{:.3f}"), cell(record, "ratio", "{:.2f}x"),
                  with_error(record, "kld_mean", "kld_mean_error", "{:.5f}"),
                  cell(record, "kld_median", "{:.5f}"), cell(record, "kld_p999", "{:.4f}"),
                  with_error(record, "ppl", "ppl_error", "{:.4f}"),
                  with_error(record, "ln_ppl_ratio", "ln_ppl_ratio_error", "{:+.5f}"),
                  with_error(record, "same_top", "same_top_error", "{:.4f}"),
                  cell(record, "cpu_seconds", "{:.0f}")});
  }
  return table;
}

std::string prompt_table(const std::vector<Record>& records) {
  std::string table = head({"cache", "bits/element", "smaller", "score", "minus fp16 (95 %)",
                            "better / worse", "McNemar p", "CPU s"});
  for (const Record& record : records) {
    std::string difference = "-", discordant = "-", p = "-";
    if (const auto versus = record.find("versus"); versus != record.end() && !versus->empty()) {
      const Record& reference = versus->begin().value();
      difference =
          fmt::format("{:+.4f} ({:+.4f} to {:+.4f})", reference["score_difference"].get<double>(),
                      reference["ci95"][0].get<double>(), reference["ci95"][1].get<double>());
      discordant =
          fmt::format("{} / {}", reference["better"].get<int>(), reference["worse"].get<int>());
      p = cell(reference, "mcnemar_p", "{:.4g}");
    }
    table += row({fmt::format("`{}`", record.at("policy").get<std::string>()),
                  cell(record, "bits_per_element", "{:.3f}"), cell(record, "ratio", "{:.2f}x"),
                  with_error(record, "score", "score_error", "{:.4f}"), difference, discordant, p,
                  cell(record, "cpu_seconds", "{:.0f}")});
  }
  return table;
}

}  // namespace

std::vector<Record> window_records(const Journal& journal, const std::vector<std::string>& policies,
                                   const std::vector<std::string>& items, const Record& base) {
  std::vector<Record> records;
  std::vector<std::vector<PositionResult>> positions;
  for (const std::string& policy : policies) {
    std::vector<const Sample*> samples;
    for (const std::string& item : items) {
      samples.push_back(&sample_of(journal, policy, item));
    }
    Record record = base;
    record["policy"] = policy;
    add_cost(record, samples);
    positions.push_back(all_positions(samples));
    add_divergence(record, positions.back());
    record["versus"] = Record::object();
    for (std::size_t other = 1; other < records.size(); ++other) {
      record["versus"][policies[other]] = compare_positions(positions.back(), positions[other]);
    }
    records.push_back(std::move(record));
  }
  return records;
}

Expected<std::vector<Record>> prompt_records(const Journal& journal, const Task& task,
                                             const std::vector<std::string>& policies,
                                             const Record& base) {
  ZC_CHECK(!policies.empty());
  std::vector<Record> records;
  std::vector<std::vector<double>> scores;
  for (const std::string& policy : policies) {
    std::vector<const Sample*> samples;
    std::vector<double> values;
    std::vector<std::pair<std::string, std::vector<double>>> more;
    for (std::size_t item = 0; item < task.prompts().size(); ++item) {
      const std::string& id = task.prompts()[item].id;
      samples.push_back(&sample_of(journal, policy, id));
      const auto score =
          task.score(item, samples.back()->answer, sample_of(journal, policies.front(), id).answer);
      if (!score) {
        return score.error();
      }
      if (!score->has_value()) {
        continue;
      }
      values.push_back((*score)->value);
      more.resize((*score)->more.size());
      for (std::size_t i = 0; i < more.size(); ++i) {
        more[i].first = (*score)->more[i].first;
        more[i].second.push_back((*score)->more[i].second);
      }
    }
    Record record = base;
    record["policy"] = policy;
    add_cost(record, samples);
    if (!values.empty()) {
      const Estimate score = estimate_mean(values);
      record["score"] = score.mean;
      record["score_error"] = score.error;
      record["score_fp16"] = records.empty() ? score.mean : records.front()["score"].get<double>();
      for (const auto& [name, column] : more) {
        record[name] = estimate_mean(column).mean;
      }
      record["versus"] = Record::object();
      for (std::size_t other = 0; other < scores.size(); ++other) {
        record["versus"][policies[other]] = compare_scores(values, scores[other]);
      }
      if (!scores.empty()) {  // of the loss against the reference
        record["ci95"] = record["versus"][policies.front()]["ci95"];
      }
    }
    scores.push_back(std::move(values));
    records.push_back(std::move(record));
  }
  return records;
}

std::string to_markdown(const std::vector<Record>& records) {
  if (records.empty()) {
    return "";
  }
  return records.front().contains("kld_mean") ? window_table(records) : prompt_table(records);
}

std::string divergence_text(const Journal& journal, const std::string& policy) {
  std::vector<const Sample*> samples;
  for (const Sample& sample : journal.samples()) {
    if (sample.policy == policy) {
      samples.push_back(&sample);
    }
  }
  return to_text(summarize(all_positions(samples)));
}

}  // namespace zipcache::eval
