#include "bench/host_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"

namespace zipcache::bench {
namespace {

constexpr std::uint32_t kChunkRows = 512;

}  // namespace

Expected<ggml_type> cache_type(const std::string& name) {
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    if (name == ggml_type_name(type)) {
      return type;
    }
  }
  return invalid_argument("peer '" + name + "' is unknown; there are f16, q8_0, q4_0");
}

HostAttention::HostAttention(const AttentionShape& shape, ggml_type type, std::uint32_t n_kv,
                             std::uint32_t n_query, const RandomRows& rows) {
  ggml_context* context = graph_.context();
  keys_ = ggml_new_tensor_2d(context, type, shape.kv_width(), n_kv);
  values_ = ggml_new_tensor_2d(context, type, shape.kv_width(), n_kv);
  ggml_tensor* q =
      ggml_new_tensor_3d(context, GGML_TYPE_F32, shape.head_dim, shape.n_heads, n_query);
  ggml_tensor* mask = ggml_new_tensor_2d(context, GGML_TYPE_F16, n_kv, n_query);
  const auto by_head = [&](ggml_tensor* kv) {
    return ggml_view_3d(context, kv, shape.head_dim, n_kv, shape.n_kv_heads,
                        ggml_row_size(type, shape.kv_width()), ggml_row_size(type, shape.head_dim),
                        0);
  };
  output_ = ggml_flash_attn_ext(context, ggml_permute(context, q, 0, 2, 1, 3), by_head(keys_),
                                by_head(values_), mask,
                                1.0f / std::sqrt(static_cast<float>(shape.head_dim)), 0.0f, 0.0f);
  graph_.finish(output_);

  fill(keys_, RandomRows::Kind::kKey, rows);
  fill(values_, RandomRows::Kind::kValue, rows);
  const std::vector<float> queries =
      rows.make(RandomRows::Kind::kQuery, n_kv - n_query, n_query, shape.q_width());
  std::memcpy(q->data, queries.data(), queries.size() * sizeof(float));
  for (std::uint32_t row = 0; row < n_query; ++row) {
    const std::uint32_t n_visible = n_kv - n_query + row + 1;
    auto* out = static_cast<ggml_fp16_t*>(mask->data) + std::size_t{row} * n_kv;
    std::fill_n(out, n_visible, ggml_fp32_to_fp16(0.0f));
    std::fill(out + n_visible, out + n_kv, ggml_fp32_to_fp16(-INFINITY));
  }
}

void HostAttention::fill(ggml_tensor* tensor, RandomRows::Kind kind, const RandomRows& rows) const {
  const auto width = static_cast<std::uint32_t>(tensor->ne[0]);
  const auto n_rows = static_cast<std::uint32_t>(tensor->ne[1]);
  for (std::uint32_t first = 0; first < n_rows; first += kChunkRows) {
    const std::uint32_t n = std::min(kChunkRows, n_rows - first);
    const std::vector<float> chunk = rows.make(kind, first, n, width);
    auto* out = static_cast<std::byte*>(tensor->data) + first * tensor->nb[1];
    const std::size_t written =
        ggml_quantize_chunk(tensor->type, chunk.data(), out, 0, n, width, /*imatrix=*/nullptr);
    ZC_CHECK(written == n * tensor->nb[1]);
  }
}

}  // namespace zipcache::bench
