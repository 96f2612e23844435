// Which nodes of the host's graphs touch a KV cache of ours, and what becomes of them. Looks at
// shapes and names only, never at data: the host also asks about graphs that are never computed and
// tensors that are never allocated.
#pragma once

#include <cstdint>
#include <string>

#include "ggml-backend.h"
#include "ggml/kv_store.h"

struct ggml_tensor;

namespace zipcache::ggml {

enum class NodeKind : std::uint8_t {
  kOther,      // does not touch a KV cache of ours: the host's CPU computes it
  kStore,      // SET_ROWS of new keys or values
  kAttend,     // FLASH_ATTN_EXT over keys and values of ours
  kShift,      // in-place ROPE of keys (context shift)
  kElsewhere,  // FLASH_ATTN_EXT over a cache in other memory (-nkvo, layers beyond -ngl)
  kRefused,    // reads or writes the cache in a way that is not served; fails when computed
};

struct NodeClass {
  NodeKind kind = NodeKind::kOther;
  std::string reason;  // of a refusal: what was found and what to do
};

// `ours` is the type of the buffers that hold our caches.
NodeClass classify(const ggml_tensor* node, ggml_backend_buffer_type_t ours);

// The tensor that `tensor` is a view of, or itself.
const ggml_tensor* base_of(const ggml_tensor* tensor);

// The base is cache_k_l<n> or cache_v_l<n> in a buffer of type `ours`.
bool is_kv(const ggml_tensor* tensor, ggml_backend_buffer_type_t ours);

// REQUIRES: classify() says kAttend.
struct AttendShape {
  std::uint32_t n_rows = 0;  // query rows per stream
  std::uint32_t n_heads = 0;
  std::uint32_t n_kv_heads = 0;
  std::uint32_t key_dim = 0;
  std::uint32_t value_dim = 0;
  std::uint32_t n_cells = 0;  // cells that the mask covers
  std::uint32_t first_stream = 0;
  std::uint32_t n_streams = 0;
  float scale = 1.0f;
  float max_bias = 0.0f;  // ALiBi, 0 = none
  float softcap = 0.0f;   // 0 = none
};
AttendShape attend_shape(const ggml_tensor* node);

}  // namespace zipcache::ggml
