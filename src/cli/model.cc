#include "cli/model.h"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>

#include "cli/host_log.h"

namespace zipcache::cli {
namespace {

constexpr std::int32_t kAllLayers = -1;

// Common mistakes, told apart before llama.cpp words them in its own way.
Status check_file(const std::string& path) {
  if (std::error_code ignored; std::filesystem::is_directory(path, ignored)) {
    return invalid_argument("can't read model " + path + ": it is a directory");
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return invalid_argument("can't read model " + path + ": " + std::strerror(errno));
  }
  std::array<char, 4> magic{};
  file.read(magic.data(), magic.size());
  if (!file || std::string_view(magic.data(), magic.size()) != "GGUF") {
    return corrupt(path + " is not a GGUF file");
  }
  return ok_status();
}

}  // namespace

Expected<Model> Model::load(const std::string& path, ggml_backend_dev_t device) {
  if (Status readable = check_file(path); !readable) {
    return readable.error();
  }
  // A list without entries, unlike no list, keeps every GPU-like device out.
  std::array<ggml_backend_dev_t, 2> devices{device, nullptr};
  llama_model_params params = llama_model_default_params();
  params.devices = devices.data();
  params.n_gpu_layers = device == nullptr ? 0 : kAllLayers;

  Model model;
  model.path_ = path;
  model.model_.reset(llama_model_load_from_file(path.c_str(), params));
  if (!model.model_) {
    return corrupt("can't load " + path + ": " + explain_failure("llama.cpp does not say why"));
  }
  if (llama_model_has_encoder(model.get()) || !llama_model_has_decoder(model.get())) {
    return unsupported(path + " is an encoder; run takes models that only decode");
  }
  model.vocab_ = llama_model_get_vocab(model.get());
  if (llama_vocab_type(model.vocab_) == LLAMA_VOCAB_TYPE_NONE) {
    return unsupported(path + " has no vocabulary");
  }
  return model;
}

std::vector<llama_token> Model::tokenize(std::string_view text, bool add_special,
                                         bool parse_special) const {
  if (text.size() > std::size_t{std::numeric_limits<std::int32_t>::max()} / 2) {
    throw std::length_error("the text is longer than llama.cpp can take");
  }
  // Never more tokens than bytes, but for the special ones at both ends.
  std::vector<llama_token> tokens(text.size() + 2);
  const auto call = [&] {
    return llama_tokenize(vocab_, text.data(), static_cast<std::int32_t>(text.size()),
                          tokens.data(), static_cast<std::int32_t>(tokens.size()), add_special,
                          parse_special);
  };
  std::int32_t n_tokens = call();
  if (n_tokens < 0 && n_tokens != std::numeric_limits<std::int32_t>::min()) {
    tokens.resize(static_cast<std::size_t>(-n_tokens));
    n_tokens = call();
  }
  if (n_tokens < 0) {
    throw std::runtime_error("llama.cpp could not turn the text into tokens");
  }
  tokens.resize(static_cast<std::size_t>(n_tokens));
  return tokens;
}

std::vector<llama_token> Model::tokenize_text(std::string_view text) const {
  return tokenize(text, /*add_special=*/false, /*parse_special=*/false);
}

std::vector<llama_token> Model::tokenize_frame(std::string_view frame, bool begins_sequence) const {
  return tokenize(frame, begins_sequence, /*parse_special=*/true);
}

std::string Model::piece(llama_token token) const {
  std::string bytes(64, '\0');
  const auto call = [&] {
    return llama_token_to_piece(vocab_, token, bytes.data(),
                                static_cast<std::int32_t>(bytes.size()),
                                /*lstrip=*/0, /*special=*/false);
  };
  std::int32_t n_bytes = call();
  if (n_bytes < 0) {
    bytes.resize(static_cast<std::size_t>(-n_bytes));
    n_bytes = call();
  }
  bytes.resize(n_bytes < 0 ? 0 : static_cast<std::size_t>(n_bytes));
  return bytes;
}

bool Model::ends_generation(llama_token token) const { return llama_vocab_is_eog(vocab_, token); }

llama_token Model::bos() const {
  return llama_vocab_get_add_bos(vocab_) ? llama_vocab_bos(vocab_) : -1;
}

std::size_t Model::n_vocab() const {
  return static_cast<std::size_t>(llama_vocab_n_tokens(vocab_));
}

std::string Model::file_name() const { return std::filesystem::path(path_).filename().string(); }

std::uint32_t Model::n_ctx_train() const {
  return static_cast<std::uint32_t>(llama_model_n_ctx_train(get()));
}

std::uint32_t Model::n_layers() const {
  return static_cast<std::uint32_t>(llama_model_n_layer(get()));
}

const char* Model::chat_template() const { return llama_model_chat_template(get(), nullptr); }

}  // namespace zipcache::cli
