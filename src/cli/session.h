// A context of a model: it reads a prompt and generates from it, and holds the KV cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/expected.h"
#include "cli/model.h"
#include "llama.h"

namespace zipcache::cli {

struct SamplingOptions {
  float temperature = 0.0f;  // 0 = always the likeliest token
  std::int32_t top_k = 40;   // 0 = all
  float top_p = 0.95f;       // 1 = all
  float min_p = 0.05f;       // 0 = all
  std::uint32_t seed = 0;
};

struct SessionOptions {
  std::uint32_t n_ctx = 0;
  std::uint32_t n_batch = 512;   // tokens per llama_decode()
  std::uint32_t n_ubatch = 512;  // tokens computed at once
  std::int32_t n_threads = 1;
  std::uint32_t n_outputs = 1;           // most tokens of a batch whose logits are wanted
  ggml_type cache_type = GGML_TYPE_F16;  // of llama.cpp's own cache
  SamplingOptions sampling;
  bool (*should_stop)() = nullptr;  // asked all the time, from any thread
};

enum class Progress { kDone, kStopped };  // kStopped: should_stop() said so

class Session {
 public:
  // REQUIRES: `model` outlives the session.
  static Expected<Session> open(const Model& model, const SessionOptions& options);

  // Reads tokens; on_progress(tokens read so far) after each batch.
  Expected<Progress> read(std::span<const llama_token> tokens,
                          const std::function<void(std::size_t n_read)>& on_progress);
  // The same, and shows the logits [n_rows, n_vocab] of tokens from number `first` on, batch by
  // batch. REQUIRES: options.n_outputs >= options.n_batch.
  using OnLogits =
      std::function<void(std::size_t row_token, std::size_t n_rows, const float* logits)>;
  Expected<Progress> read_scored(std::span<const llama_token> tokens, std::size_t first,
                                 const OnLogits& on_logits);
  // Forgets all tokens.
  void clear();
  // The next token. REQUIRES: the last read() was done.
  llama_token sample();

  std::size_t n_vocab() const {
    return static_cast<std::size_t>(
        llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context_.get()))));
  }
  std::uint32_t n_ctx() const { return llama_n_ctx(context_.get()); }
  // What the cells in use take in the host's own FP16 cache, but for a few bytes per cell.
  std::size_t state_bytes() const { return llama_state_seq_get_size(context_.get(), 0); }

 private:
  struct ContextDeleter {
    void operator()(llama_context* context) const { llama_free(context); }
  };
  struct SamplerDeleter {
    void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
  };

  Session() = default;
  Expected<Progress> decode(const llama_batch& batch);

  SessionOptions options_;
  std::unique_ptr<llama_context, ContextDeleter> context_;
  std::unique_ptr<llama_sampler, SamplerDeleter> sampler_;
};

}  // namespace zipcache::cli
