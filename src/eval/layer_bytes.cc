#include "eval/layer_bytes.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "base/check.h"
#include "cache/layer_cache.h"
#include "cache/sealer.h"

namespace zipcache::eval {
namespace {

// The step that attention would make, without the attention.
Status append(cache::LayerCache& layer, std::span<const std::uint32_t> cells,
              std::span<const Half> zeros) {
  const cache::RowsView rows{.data = zeros.data(), .stride_bytes = 0, .is_half = true};
  for (const cache::Tensor tensor : {cache::Tensor::kKey, cache::Tensor::kValue}) {
    if (Status written = layer.put(tensor, cells, rows); !written) {
      return written;
    }
  }
  if (!layer.policy().seals()) {
    return ok_status();
  }
  cache::Visibility everything;
  everything.assign(nullptr, 0, static_cast<std::uint32_t>(cells.size()), cells.back() + 1);
  std::vector<cache::Probe> probes;
  cache::SealerScratch scratch;
  cache::Sealer sealer(layer, scratch);
  sealer.begin_step(everything, /*first_row=*/0, &probes);
  const std::vector<float> no_query(layer.key_dim());
  sealer.observe_queries(no_query.data(), /*row_stride=*/0, /*head_stride=*/0,
                         /*heads_per_group=*/1);
  return sealer.end_step();
}

}  // namespace

Expected<cache::ByteCount> layer_bytes(std::shared_ptr<const policy::Policy> policy,
                                       const LayerDims& dims, std::uint32_t n_tokens,
                                       std::uint32_t tokens_per_step, std::uint32_t prompt_tokens) {
  ZC_CHECK(tokens_per_step > 0);
  const cache::LayerCache::Shape shape{.layer = 0,
                                       .n_cells = std::max(1u, n_tokens),
                                       .key_row = dims.n_kv_heads * dims.key_dim,
                                       .value_row = dims.n_kv_heads * dims.value_dim};
  if (shape.key_row == 0 || shape.value_row == 0) {
    return invalid_argument("a layer needs at least one KV head of at least 16 channels");
  }
  cache::LayerCache layer(shape, std::move(policy), std::make_shared<cache::Budget>());
  if (Status known = layer.set_heads(dims.n_kv_heads, dims.key_dim, dims.value_dim); !known) {
    return known.error();
  }
  const std::vector<Half> zeros(std::max(shape.key_row, shape.value_row));
  std::vector<std::uint32_t> cells;
  const std::uint32_t of_prompt = std::min(n_tokens, prompt_tokens);
  std::uint32_t n = 0;
  for (std::uint32_t begin = 0; begin < n_tokens; begin += n) {
    n = begin < of_prompt ? std::min(tokens_per_step, of_prompt - begin) : 1;
    cells.resize(n);
    std::iota(cells.begin(), cells.end(), begin);
    if (Status appended = append(layer, cells, zeros); !appended) {
      return appended.error();
    }
  }
  return layer.bytes();
}

}  // namespace zipcache::eval
