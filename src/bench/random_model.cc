#include "bench/random_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "base/half.h"
#include "base/philox.h"
#include "ggml.h"
#include "gguf.h"

namespace zipcache::bench {
namespace {

constexpr std::array kShapes = {
    ModelShape{"tiny", 2, 256, 512, 4, 2, 512, 1e4f},
    ModelShape{"smollm2-135m", 30, 576, 1536, 9, 3, 49152, 1e5f},
    ModelShape{"llama3-8b-4l", 4, 4096, 14336, 32, 8, 2048, 5e5f},
};
constexpr std::uint32_t kContext = 131072;

class Writer {
 public:
  Writer(const ModelShape& shape, std::uint64_t seed)
      : shape_(shape),
        seed_(seed),
        gguf_(gguf_init_empty()),
        tensors_(ggml_init({memory(), nullptr, false})) {}

  bool write(const std::string& path) {
    add_hyperparameters();
    add_vocabulary();
    add_weights();
    return gguf_write_to_file(gguf_.get(), path.c_str(), /*only_meta=*/false);
  }

 private:
  struct Free {
    void operator()(gguf_context* context) const { gguf_free(context); }
    void operator()(ggml_context* context) const { ggml_free(context); }
  };

  std::uint32_t kv_width() const { return shape_.n_embd / shape_.n_heads * shape_.n_kv_heads; }

  std::size_t memory() const {
    const std::size_t per_layer =
        std::size_t{shape_.n_embd} * (2 * shape_.n_embd + 2 * kv_width() + 3 * shape_.n_ff + 64);
    const std::size_t weights =
        per_layer * shape_.n_layers + std::size_t{shape_.n_embd} * (shape_.n_vocab + 64);
    return weights / 16 * 9 +
           (std::size_t{shape_.n_layers} * 9 + 8) * (ggml_tensor_overhead() + 64) +
           (std::size_t{1} << 20);
  }

  void set(const char* key, std::uint32_t value) {
    gguf_set_val_u32(gguf_.get(), (std::string("llama.") + key).c_str(), value);
  }

  void add_hyperparameters() {
    gguf_set_val_str(gguf_.get(), "general.architecture", "llama");
    gguf_set_val_str(gguf_.get(), "general.name", shape_.name);
    set("context_length", kContext);
    set("embedding_length", shape_.n_embd);
    set("block_count", shape_.n_layers);
    set("feed_forward_length", shape_.n_ff);
    set("attention.head_count", shape_.n_heads);
    set("attention.head_count_kv", shape_.n_kv_heads);
    set("rope.dimension_count", shape_.n_embd / shape_.n_heads);
    gguf_set_val_f32(gguf_.get(), "llama.rope.freq_base", shape_.rope_base);
    gguf_set_val_f32(gguf_.get(), "llama.attention.layer_norm_rms_epsilon", 1e-5f);
  }

  // The characters that stand for bytes in GPT-2's vocabularies: printable Latin-1 for themselves,
  // the others from U+0100 on.
  static std::string byte_token(std::uint32_t byte, std::uint32_t* next_other) {
    const bool is_plain = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    const std::uint32_t code = is_plain ? byte : 256 + (*next_other)++;
    if (code < 0x80) {
      return {static_cast<char>(code)};
    }
    return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
  }

  void add_vocabulary() {
    std::vector<std::string> tokens;
    std::uint32_t next_other = 0;
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      tokens.push_back(byte_token(byte, &next_other));
    }
    tokens.emplace_back("<end>");
    while (tokens.size() < shape_.n_vocab) {
      tokens.push_back(fmt::format("<filler {}>", tokens.size()));
    }
    std::vector<const char*> texts(tokens.size());
    std::transform(tokens.begin(), tokens.end(), texts.begin(),
                   [](const std::string& token) { return token.c_str(); });
    constexpr std::int32_t kNormal = 1, kControl = 3;
    std::vector<std::int32_t> kinds(tokens.size(), kNormal);
    kinds[256] = kControl;
    const char* merge = "a b";
    gguf_set_val_str(gguf_.get(), "tokenizer.ggml.model", "gpt2");
    gguf_set_val_str(gguf_.get(), "tokenizer.ggml.pre", "gpt-2");
    gguf_set_arr_str(gguf_.get(), "tokenizer.ggml.tokens", texts.data(), texts.size());
    gguf_set_arr_data(gguf_.get(), "tokenizer.ggml.token_type", GGUF_TYPE_INT32, kinds.data(),
                      kinds.size());
    gguf_set_arr_str(gguf_.get(), "tokenizer.ggml.merges", &merge, 1);
    gguf_set_val_u32(gguf_.get(), "tokenizer.ggml.eos_token_id", 256);
  }

  void add_weights() {
    add_matrix("token_embd.weight", shape_.n_embd, shape_.n_vocab);
    add_ones("output_norm.weight");
    for (std::uint32_t layer = 0; layer < shape_.n_layers; ++layer) {
      const std::string prefix = fmt::format("blk.{}.", layer);
      add_ones(prefix + "attn_norm.weight");
      add_ones(prefix + "ffn_norm.weight");
      add_matrix(prefix + "attn_q.weight", shape_.n_embd, shape_.n_embd);
      add_matrix(prefix + "attn_k.weight", shape_.n_embd, kv_width());
      add_matrix(prefix + "attn_v.weight", shape_.n_embd, kv_width());
      add_matrix(prefix + "attn_output.weight", shape_.n_embd, shape_.n_embd);
      add_matrix(prefix + "ffn_gate.weight", shape_.n_embd, shape_.n_ff);
      add_matrix(prefix + "ffn_up.weight", shape_.n_embd, shape_.n_ff);
      add_matrix(prefix + "ffn_down.weight", shape_.n_ff, shape_.n_embd);
    }
  }

  void add(ggml_tensor* tensor, const std::string& name) {
    ggml_set_name(tensor, name.c_str());
    gguf_add_tensor(gguf_.get(), tensor);
  }

  void add_ones(const std::string& name) {
    ggml_tensor* tensor = ggml_new_tensor_1d(tensors_.get(), GGML_TYPE_F32, shape_.n_embd);
    std::fill_n(static_cast<float*>(tensor->data), shape_.n_embd, 1.0f);
    add(tensor, name);
  }

  // Q4_0, written as it is stored: per 32 weights an fp16 scale and 16 bytes of two codes each.
  void add_matrix(const std::string& name, std::uint32_t n_in, std::uint32_t n_out) {
    constexpr std::size_t kBlockBytes = 18;
    constexpr float kCodeDeviation = 4.6f;  // of a uniform code in -8..7
    ggml_tensor* tensor = ggml_new_tensor_2d(tensors_.get(), GGML_TYPE_Q4_0, n_in, n_out);
    const float scale = 1.0f / (std::sqrt(static_cast<float>(n_in)) * kCodeDeviation);
    auto* out = static_cast<std::byte*>(tensor->data);
    Philox random(seed_, n_tensors_++, 0);
    for (std::size_t block = 0; block < ggml_nbytes(tensor) / kBlockBytes; ++block) {
      const Half half =
          float_to_half(scale * (0.5f + static_cast<float>(random.next()) * 0x1p-32f));
      std::memcpy(out, &half, sizeof half);
      for (std::size_t word = 0; word < 4; ++word) {
        const std::uint32_t codes = random.next();
        std::memcpy(out + sizeof half + word * sizeof codes, &codes, sizeof codes);
      }
      out += kBlockBytes;
    }
    add(tensor, name);
  }

  const ModelShape& shape_;
  const std::uint64_t seed_;
  std::uint32_t n_tensors_ = 0;
  std::unique_ptr<gguf_context, Free> gguf_;
  std::unique_ptr<ggml_context, Free> tensors_;
};

}  // namespace

Expected<ModelShape> model_shape(std::string_view name) {
  for (const ModelShape& shape : kShapes) {
    if (name == shape.name) {
      return shape;
    }
  }
  return invalid_argument("model shape '" + std::string(name) + "' is unknown; there are " +
                          model_shape_names());
}

std::string model_shape_names() {
  std::string names;
  for (const ModelShape& shape : kShapes) {
    names.append(names.empty() ? "" : ", ").append(shape.name);
  }
  return names;
}

Status write_random_model(const ModelShape& shape, std::uint64_t seed, const std::string& path) {
  if (std::filesystem::exists(path)) {
    return ok_status();
  }
  // Under another name until it is whole: what was cut short is not taken for a model.
  const std::string unfinished = path + ".part";
  std::error_code failed;
  if (!Writer(shape, seed).write(unfinished)) {
    return invalid_argument("can't write " + unfinished);
  }
  std::filesystem::rename(unfinished, path, failed);
  return failed ? Status(invalid_argument("can't write " + path + ": " + failed.message()))
                : ok_status();
}

}  // namespace zipcache::bench
