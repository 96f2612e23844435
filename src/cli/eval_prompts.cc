#include "cli/eval_prompts.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "cli/chat_prompt.h"
#include "cli/cpu_time.h"
#include "cli/interrupt.h"

namespace zipcache::cli {
namespace {

using Tokens = std::vector<llama_token>;

Expected<Tokens> tokens_of(const Model& model, const eval::Prompt& prompt,
                           const std::string& chat_template) {
  if (!prompt.tokens.empty()) {
    return prompt.tokens;
  }
  if (prompt.is_chat && chat_template.empty() && model.chat_template() == nullptr) {
    return unsupported(model.file_name() + " has no chat template; name one with --chat-template");
  }
  return make_prompt(model, {.text = {},
                             .question = prompt.text,
                             .system = {},
                             .is_raw = !prompt.is_chat,
                             .chat_template = chat_template});
}

// The beginning and the end of a prompt, as many tokens as fit.
void cut_middle(Tokens& tokens, std::size_t n_kept) {
  const std::size_t n_front = n_kept / 2;
  tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(n_front),
               tokens.end() - static_cast<std::ptrdiff_t>(n_kept - n_front));
}

// Cuts `text` before the first of the stops; false if it has none.
bool cut_at_stop(std::string& text, const std::vector<std::string>& stops) {
  std::size_t at = std::string::npos;
  for (const std::string& stop : stops) {
    at = std::min(at, text.find(stop));
  }
  if (at == std::string::npos) {
    return false;
  }
  text.resize(at);
  return true;
}

Expected<Progress> answer(const Model& model, Session& session, std::span<const llama_token> tokens,
                          const eval::Prompt& prompt, eval::Answer& answer) {
  const auto ignore = [](std::size_t) {};
  Expected<Progress> read = session.read(tokens, ignore);
  while (read && *read == Progress::kDone) {
    const llama_token token = session.sample();
    if (model.ends_generation(token)) {
      break;
    }
    answer.tokens.push_back(token);
    answer.text += model.piece(token);
    if (cut_at_stop(answer.text, prompt.stops) || answer.tokens.size() == prompt.max_tokens) {
      break;
    }
    read = session.read({&token, 1}, ignore);
  }
  return read;
}

}  // namespace

Expected<PreparedPrompts> prepare_prompts(const Model& model, const eval::Task& task,
                                          const EvalOptions& options) {
  PreparedPrompts prepared;
  const std::size_t limit = options.n_ctx == 0 ? model.n_ctx_train() : options.n_ctx;
  std::size_t longest = 0;
  for (const eval::Prompt& prompt : task.prompts()) {
    Expected<Tokens> tokens = tokens_of(model, prompt, options.chat_template);
    if (!tokens) {
      return tokens.error();
    }
    if (tokens->size() + prompt.max_tokens > limit) {
      if (!prompt.may_cut_middle || limit <= prompt.max_tokens) {
        return invalid_argument(
            fmt::format("{}: {} tokens and an answer of {} do not fit in a context of {} (-c)",
                        prompt.id, tokens->size(), prompt.max_tokens, limit));
      }
      cut_middle(*tokens, limit - prompt.max_tokens);
    }
    longest = std::max(longest, tokens->size() + prompt.max_tokens);
    prepared.tokens.push_back(std::move(*tokens));
  }
  prepared.n_ctx = options.n_ctx == 0 ? static_cast<std::uint32_t>(longest) : options.n_ctx;
  return prepared;
}

Expected<Progress> run_prompts(const EvalCaches& caches, std::span<const eval::PolicySpec> policies,
                               const eval::Task& task, const PreparedPrompts& prepared,
                               const EvalOptions& options, eval::Journal& journal,
                               EvalProgress& progress) {
  for (const eval::PolicySpec& policy : policies) {
    std::optional<Session> session;  // opened for the first sample that is missing
    for (std::size_t index = 0; index < task.prompts().size(); ++index) {
      const eval::Prompt& prompt = task.prompts()[index];
      if (journal.find(policy.name, prompt.id) != nullptr) {
        continue;
      }
      if (!session) {
        Expected<Session> opened = caches.open(policy, {.n_ctx = prepared.n_ctx,
                                                        .n_batch = options.n_ubatch,
                                                        .n_ubatch = options.n_ubatch,
                                                        .n_threads = options.n_threads,
                                                        .sampling = {},
                                                        .should_stop = is_interrupted});
        if (!opened) {
          return opened.error();
        }
        session.emplace(std::move(*opened));
      }
      session->clear();
      eval::Sample sample{.policy = policy.name, .item = prompt.id};
      const double start = cpu_seconds();
      Expected<Progress> done =
          answer(caches.model(), *session, prepared.tokens[index], prompt, sample.answer);
      if (!done || *done == Progress::kStopped) {
        return done;
      }
      sample.cpu_seconds = cpu_seconds() - start;
      sample.n_tokens = prepared.tokens[index].size() + sample.answer.tokens.size();
      const Expected<cache::ByteCount> bytes = caches.bytes(policy, *session);
      if (!bytes) {
        return bytes.error();
      }
      sample.bytes = *bytes;
      if (Status added = journal.add(std::move(sample)); !added) {
        return added.error();
      }
      progress.finish(policy.name, prompt.id);
    }
  }
  return Progress::kDone;
}

}  // namespace zipcache::cli
