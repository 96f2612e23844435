// A GGUF model, loaded by llama.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/expected.h"
#include "llama.h"

namespace zipcache::cli {

class Model {
 public:
  // Puts all layers on `device`, or leaves them to llama.cpp's CPU path when it is nullptr. An
  // error names the file and what is wrong with it, and so for everything that can't generate text.
  static Expected<Model> load(const std::string& path, ggml_backend_dev_t device);

  // Ordinary text: "<s>" or "<|im_end|>" in it stay letters, so that a document can't pose as a
  // turn of the conversation.
  std::vector<llama_token> tokenize_text(std::string_view text) const;
  // The frame around texts: control tokens count, and the first one begins the sequence.
  std::vector<llama_token> tokenize_frame(std::string_view frame, bool begins_sequence) const;

  // Bytes of a token, "" for control tokens; not always whole characters.
  std::string piece(llama_token token) const;
  bool ends_generation(llama_token token) const;

  // The token that begins a sequence, or -1 when the model takes none.
  llama_token bos() const;
  std::size_t n_vocab() const;

  std::string file_name() const;
  std::uint32_t n_ctx_train() const;
  std::uint32_t n_layers() const;
  const char* chat_template() const;  // nullptr when the file has none
  llama_model* get() const { return model_.get(); }

 private:
  struct Deleter {
    void operator()(llama_model* model) const { llama_model_free(model); }
  };

  Model() = default;
  std::vector<llama_token> tokenize(std::string_view text, bool add_special,
                                    bool parse_special) const;

  std::string path_;
  std::unique_ptr<llama_model, Deleter> model_;
  const llama_vocab* vocab_ = nullptr;
};

}  // namespace zipcache::cli
