#include "cli/eval_windows.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include "cli/cpu_time.h"
#include "cli/interrupt.h"
#include "eval/divergence.h"

namespace zipcache::cli {
namespace {

// Calls visit(row) for all rows, on several threads.
template <typename Visit>
void for_each_row(std::size_t n_rows, std::int32_t n_threads, const Visit& visit) {
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t row = next++; row < n_rows; row = next++) {
      visit(row);
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t i = 1; i < std::min<std::size_t>(n_rows, std::size_t(n_threads)); ++i) {
    threads.emplace_back(work);
  }
  work();
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// Reads a window; visit(row, logits) for its scored positions, counted from the first of them.
template <typename Visit>
Expected<Progress> read_window(Session& session, const eval::Window& window, ReadingStyle style,
                               std::int32_t n_threads, double* visit_seconds, const Visit& visit) {
  const std::size_t n_vocab = session.n_vocab();
  const auto on_logits = [&](std::size_t position, std::size_t n_rows, const float* logits) {
    const double start = cpu_seconds();
    for_each_row(n_rows, n_threads, [&](std::size_t i) {
      const std::size_t row = position + i - window.first_scored;
      if (row < window.n_scored()) {  // the last token predicts nothing that is known
        visit(row, logits + i * n_vocab);
      }
    });
    *visit_seconds += cpu_seconds() - start;
  };
  const std::span<const llama_token> tokens = window.tokens;
  if (style == ReadingStyle::kPrompt) {
    return session.read_scored(tokens, window.first_scored, on_logits);
  }
  Expected<Progress> read =
      session.read_scored(tokens.first(window.first_scored), window.first_scored, on_logits);
  for (std::size_t position = window.first_scored;
       position < tokens.size() && read && *read == Progress::kDone; ++position) {
    read = session.read_scored(tokens.subspan(position, 1), 0,
                               [&](std::size_t, std::size_t n_rows, const float* logits) {
                                 on_logits(position, n_rows, logits);
                               });
  }
  return read;
}

class WindowRun {
 public:
  WindowRun(const EvalCaches& caches, const eval::Window& window, const EvalOptions& options)
      : caches_(caches),
        window_(window),
        options_(options),
        reference_(window.n_scored(), caches.model().n_vocab()) {}

  // Reads the window and compares with the first reading, which is compared with itself.
  Expected<Progress> read(const eval::PolicySpec& policy, eval::Sample& sample) {
    const bool is_reference = !std::exchange(has_reference_, true);
    Expected<Session> session = open(policy);
    if (!session) {
      return session.error();
    }
    sample.positions.resize(window_.n_scored());
    double visit_seconds = 0;
    const double start = cpu_seconds();
    Expected<Progress> read =
        read_window(*session, window_, options_.style, options_.n_threads, &visit_seconds,
                    [&](std::size_t row, const float* logits) {
                      if (is_reference) {
                        reference_.store(row, logits);
                      }
                      sample.positions[row] = eval::compare(
                          logits, reference_, row, window_.target(window_.first_scored + row));
                    });
    if (!read || *read == Progress::kStopped) {
      return read;
    }
    sample.cpu_seconds = cpu_seconds() - start - visit_seconds;
    sample.n_tokens = window_.tokens.size();
    const Expected<cache::ByteCount> bytes = caches_.bytes(policy, *session);
    if (!bytes) {
      return bytes.error();
    }
    sample.bytes = *bytes;
    return Progress::kDone;
  }

 private:
  Expected<Session> open(const eval::PolicySpec& policy) const {
    const std::uint32_t n_batch = std::min(options_.n_ubatch, options_.n_ctx);
    return caches_.open(policy, {.n_ctx = options_.n_ctx,
                                 .n_batch = n_batch,
                                 .n_ubatch = n_batch,
                                 .n_threads = options_.n_threads,
                                 .n_outputs = n_batch,
                                 .sampling = {},
                                 .should_stop = is_interrupted});
  }

  const EvalCaches& caches_;
  const eval::Window& window_;
  const EvalOptions& options_;
  eval::ReferenceRows reference_;
  bool has_reference_ = false;
};

}  // namespace

std::string window_item(std::size_t index) { return std::to_string(index); }

Expected<Progress> run_windows(const EvalCaches& caches, std::span<const eval::PolicySpec> policies,
                               std::span<const eval::Window> windows, const EvalOptions& options,
                               eval::Journal& journal, EvalProgress& progress) {
  for (std::size_t index = 0; index < windows.size(); ++index) {
    const std::string item = window_item(index);
    std::vector<const eval::PolicySpec*> missing;
    for (const eval::PolicySpec& policy : policies) {
      if (journal.find(policy.name, item) == nullptr) {
        missing.push_back(&policy);
      }
    }
    if (missing.empty()) {
      continue;
    }
    const bool reference_is_known = missing[0] != policies.data();
    if (reference_is_known) {  // its predictions are not
      missing.insert(missing.begin(), policies.data());
    }
    WindowRun run(caches, windows[index], options);
    for (const eval::PolicySpec* policy : missing) {
      eval::Sample sample{.policy = policy->name, .item = item};
      if (Expected<Progress> read = run.read(*policy, sample);
          !read || *read == Progress::kStopped) {
        return read;
      }
      if (policy == policies.data() && reference_is_known) {
        continue;
      }
      if (Status added = journal.add(std::move(sample)); !added) {
        return added.error();
      }
      progress.finish(policy->name, "window " + item);
    }
  }
  return Progress::kDone;
}

}  // namespace zipcache::cli
