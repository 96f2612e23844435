#include "cli/gguf_shape.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "cli/host_log.h"
#include "gguf.h"

namespace zipcache::cli {
namespace {

class Metadata {
 public:
  explicit Metadata(const std::string& path)
      : file_(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = nullptr})) {
    const std::int64_t id = file_ ? gguf_find_key(file_.get(), "general.architecture") : -1;
    if (id >= 0 && gguf_get_kv_type(file_.get(), id) == GGUF_TYPE_STRING) {
      architecture_ = gguf_get_val_str(file_.get(), id);
    }
  }

  bool is_readable() const { return !architecture_.empty(); }

  // A number, or the numbers of an array; empty if the key is missing or holds something else.
  std::vector<std::uint32_t> numbers(const char* key) const {
    const std::int64_t id = gguf_find_key(file_.get(), (architecture_ + "." + key).c_str());
    if (id < 0) {
      return {};
    }
    const gguf_type type = gguf_get_kv_type(file_.get(), id);
    if (type == GGUF_TYPE_UINT32) {
      return {gguf_get_val_u32(file_.get(), id)};
    }
    if (type != GGUF_TYPE_ARRAY) {
      return {};
    }
    const gguf_type element = gguf_get_arr_type(file_.get(), id);
    if (element != GGUF_TYPE_UINT32 && element != GGUF_TYPE_INT32) {
      return {};
    }
    const auto* first = static_cast<const std::uint32_t*>(gguf_get_arr_data(file_.get(), id));
    return {first, first + gguf_get_arr_n(file_.get(), id)};
  }

  std::optional<std::uint32_t> number(const char* key) const {
    const std::vector<std::uint32_t> all = numbers(key);
    return all.size() == 1 ? std::optional(all.front()) : std::nullopt;
  }

 private:
  struct Free {
    void operator()(gguf_context* file) const { gguf_free(file); }
  };
  std::unique_ptr<gguf_context, Free> file_;
  std::string architecture_;
};

}  // namespace

Expected<std::vector<LayerGroup>> read_gguf_shape(const std::string& path) {
  const Metadata metadata(path);
  if (!metadata.is_readable()) {
    return corrupt("can't read " + path + ": " + explain_failure("not a GGUF file of a model"));
  }
  const auto n_layers = metadata.number("block_count");
  const auto n_embd = metadata.number("embedding_length");
  const std::vector<std::uint32_t> n_heads = metadata.numbers("attention.head_count");
  std::vector<std::uint32_t> n_kv_heads = metadata.numbers("attention.head_count_kv");
  if (n_kv_heads.empty()) {
    n_kv_heads = n_heads;  // no grouped queries
  }
  if (!n_layers || !n_embd || n_heads.empty() || n_heads.front() == 0) {
    return unsupported(path + " does not tell its layers and heads");
  }
  const std::uint32_t head_dim = *n_embd / n_heads.front();
  const std::uint32_t key_dim = metadata.number("attention.key_length").value_or(head_dim);
  const std::uint32_t value_dim = metadata.number("attention.value_length").value_or(head_dim);
  std::vector<LayerGroup> groups;
  for (std::uint32_t layer = 0; layer < *n_layers; ++layer) {
    const std::uint32_t heads = n_kv_heads[std::min<std::size_t>(layer, n_kv_heads.size() - 1)];
    if (heads == 0) {
      continue;  // a layer without attention
    }
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const LayerGroup& group) {
      return group.dims.n_kv_heads == heads;
    });
    if (same == groups.end()) {
      groups.push_back({{heads, key_dim, value_dim}, 1});
    } else {
      ++same->n_layers;
    }
  }
  return groups;
}

}  // namespace zipcache::cli
