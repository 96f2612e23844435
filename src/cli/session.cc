#include "cli/session.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cli/host_log.h"

namespace zipcache::cli {
namespace {

llama_sampler* make_sampler(const SamplingOptions& options) {
  llama_sampler* chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
  if (options.temperature <= 0.0f) {
    llama_sampler_chain_add(chain, llama_sampler_init_greedy());
    return chain;
  }
  llama_sampler_chain_add(chain, llama_sampler_init_top_k(options.top_k));
  llama_sampler_chain_add(chain, llama_sampler_init_top_p(options.top_p, /*min_keep=*/1));
  llama_sampler_chain_add(chain, llama_sampler_init_min_p(options.min_p, /*min_keep=*/1));
  llama_sampler_chain_add(chain, llama_sampler_init_temp(options.temperature));
  llama_sampler_chain_add(chain, llama_sampler_init_dist(options.seed));
  return chain;
}

bool ask_to_abort(void* should_stop) { return reinterpret_cast<bool (*)()>(should_stop)(); }

// llama.cpp takes a mutable pointer and only reads through it.
llama_batch batch_of(std::span<const llama_token> tokens) {
  return llama_batch_get_one(const_cast<llama_token*>(tokens.data()),
                             static_cast<std::int32_t>(tokens.size()));
}

}  // namespace

Expected<Session> Session::open(const Model& model, const SessionOptions& options) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = options.n_ctx;
  params.n_batch = options.n_batch;
  params.n_ubatch = std::min(options.n_ubatch, options.n_batch);
  params.n_threads = params.n_threads_batch = options.n_threads;
  params.n_seq_max = 1;
  params.n_outputs_max = options.n_outputs;
  params.swa_full = false;  // as llama.cpp's own programs have it
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  params.type_k = params.type_v = options.cache_type;
  if (options.should_stop != nullptr) {
    params.abort_callback = ask_to_abort;
    params.abort_callback_data = reinterpret_cast<void*>(options.should_stop);
  }

  Session session;
  session.options_ = options;
  session.context_.reset(llama_init_from_model(model.get(), params));
  if (!session.context_) {
    return unsupported("can't make a context of " + std::to_string(options.n_ctx) +
                       " tokens: " + explain_failure("llama.cpp does not say why"));
  }
  session.sampler_.reset(make_sampler(options.sampling));
  return session;
}

Expected<Progress> Session::decode(const llama_batch& batch) {
  constexpr std::int32_t kNoRoom = 1, kAborted = 2;
  if (options_.should_stop != nullptr && options_.should_stop()) {
    return Progress::kStopped;
  }
  const std::int32_t status = llama_decode(context_.get(), batch);
  if (status == kAborted) {
    return Progress::kStopped;
  }
  if (status == kNoRoom) {
    return out_of_memory("the context of " + std::to_string(n_ctx()) + " tokens is full");
  }
  if (status != 0) {
    return out_of_memory("llama.cpp could not compute the next tokens: " +
                         explain_failure("status " + std::to_string(status)));
  }
  return Progress::kDone;
}

Expected<Progress> Session::read(std::span<const llama_token> tokens,
                                 const std::function<void(std::size_t)>& on_progress) {
  for (std::size_t n_read = 0; n_read < tokens.size();) {
    const auto part =
        tokens.subspan(n_read, std::min<std::size_t>(tokens.size() - n_read, options_.n_batch));
    Expected<Progress> decoded = decode(batch_of(part));
    if (!decoded || *decoded == Progress::kStopped) {
      return decoded;
    }
    n_read += part.size();
    on_progress(n_read);
  }
  return Progress::kDone;
}

Expected<Progress> Session::read_scored(std::span<const llama_token> tokens, std::size_t first,
                                        const OnLogits& on_logits) {
  std::vector<std::int8_t> is_wanted;
  for (std::size_t n_read = 0; n_read < tokens.size();) {
    const auto part =
        tokens.subspan(n_read, std::min<std::size_t>(tokens.size() - n_read, options_.n_batch));
    const std::size_t n_skipped = std::min(part.size(), std::max(first, n_read) - n_read);
    is_wanted.assign(part.size(), 1);
    std::fill_n(is_wanted.begin(), n_skipped, std::int8_t{0});
    llama_batch batch = batch_of(part);
    batch.logits = is_wanted.data();
    Expected<Progress> decoded = decode(batch);
    if (!decoded || *decoded == Progress::kStopped) {
      return decoded;
    }
    if (n_skipped < part.size()) {
      on_logits(n_read + n_skipped, part.size() - n_skipped, llama_get_logits(context_.get()));
    }
    n_read += part.size();
  }
  return Progress::kDone;
}

void Session::clear() { llama_memory_clear(llama_get_memory(context_.get()), /*data=*/true); }

llama_token Session::sample() {
  return llama_sampler_sample(sampler_.get(), context_.get(), /*idx=*/-1);
}

}  // namespace zipcache::cli
