#include "bench/cache_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "bench/measure.h"

namespace zipcache::bench {
namespace {

constexpr std::uint32_t kChunkTokens = 512;
constexpr Half kHidden = 0xfc00;

}  // namespace

CacheAttention::CacheAttention(const AttentionShape& shape,
                               std::shared_ptr<const policy::Policy> policy,
                               const kernels::KernelTable* kernels, std::uint32_t n_kv,
                               std::uint32_t n_query, const RandomRows& rows)
    : shape_(shape),
      n_kv_(n_kv),
      n_query_(n_query),
      rows_(rows),
      cache_(
          {.layer = 0, .n_cells = n_kv, .key_row = shape.kv_width(), .value_row = shape.kv_width()},
          std::move(policy), std::make_shared<cache::Budget>()),
      attention_(kernels) {
  cache_.set_heads(shape.n_kv_heads, shape.head_dim, shape.head_dim).value();
  query_.q_row_stride = query_.out_row_stride = shape.q_width();
  query_.q_head_stride = query_.out_head_stride = shape.head_dim;
  query_.n_heads = shape.n_heads;
  query_.visible = &visible_;
  query_.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  fill(n_kv - n_query);

  newest_keys_ = rows.make(RandomRows::Kind::kKey, n_kv - n_query, n_query, shape.kv_width());
  newest_values_ = rows.make(RandomRows::Kind::kValue, n_kv - n_query, n_query, shape.kv_width());
  show(n_kv - n_query, n_query, 0);
  put_newest();

  ggml_tensor* node = nullptr;
  const auto then = [&](ggml_custom_op_t function, int n_tasks) {
    node = ggml_custom_4d(graph_.context(), GGML_TYPE_F32, 1, 1, 1, 1, &node,
                          node == nullptr ? 0 : 1, function, n_tasks, this);
  };
  then(call_prepare, 1);
  then(call_run, GGML_N_TASKS_MAX);
  graph_.finish(node);
}

void CacheAttention::put(std::uint32_t first, std::uint32_t n) {
  std::vector<std::uint32_t> cells(n);
  std::iota(cells.begin(), cells.end(), first);
  const std::size_t stride = shape_.kv_width() * sizeof(float);
  const auto put_rows = [&](cache::Tensor tensor, const std::vector<float>& rows) {
    cache_.put(tensor, cells, {rows.data(), stride, /*is_half=*/false}).value();
  };
  const bool is_newest = n == n_query_ && first == n_kv_ - n_query_;
  put_rows(
      cache::Tensor::kKey,
      is_newest ? newest_keys_ : rows_.make(RandomRows::Kind::kKey, first, n, shape_.kv_width()));
  put_rows(cache::Tensor::kValue,
           is_newest ? newest_values_
                     : rows_.make(RandomRows::Kind::kValue, first, n, shape_.kv_width()));
}

void CacheAttention::put_newest() { put(n_kv_ - n_query_, n_query_); }

// As a prompt is read, but for the attention to tokens before the last chunk: it would take longer
// than all measurements and changes nothing about what is stored but which tokens are salient.
void CacheAttention::fill(std::uint32_t n_tokens) {
  for (std::uint32_t first = 0; first < n_tokens; first += kChunkTokens) {
    const std::uint32_t n = std::min(kChunkTokens, n_tokens - first);
    put(first, n);
    show(first, n, first < kChunkTokens ? 0 : first - kChunkTokens);
    prepare(1);
    attention_.run(0);
    attention_.commit().value();
  }
}

double CacheAttention::run(std::uint32_t n_threads, bool flushes_caches) {
  const auto before = cache_.policy_time();
  const double seconds = graph_.compute(n_threads, flushes_caches);
  done_.value();
  commit_seconds_ = std::chrono::duration<double>(cache_.policy_time() - before).count();
  return seconds;
}

void CacheAttention::show(std::uint32_t first_row, std::uint32_t n_rows,
                          std::uint32_t first_visible) {
  const std::uint32_t n_cells = first_row + n_rows;
  mask_.assign(std::size_t{n_rows} * n_cells, kHidden);
  for (std::uint32_t row = 0; row < n_rows; ++row) {
    const auto begin = mask_.begin() + static_cast<std::ptrdiff_t>(std::size_t{row} * n_cells);
    std::fill(begin + first_visible, begin + first_row + row + 1, Half{0});
  }
  visible_.assign(mask_.data(), n_cells, n_rows, n_cells);
  queries_ = rows_.make(RandomRows::Kind::kQuery, first_row, n_rows, shape_.q_width());
  output_.resize(queries_.size());
  query_.q = queries_.data();
  query_.out = output_.data();
  query_.n_rows = n_rows;
}

void CacheAttention::prepare(std::uint32_t n_threads) {
  done_ = attention_.prepare(cache_, query_, n_threads);
}

void CacheAttention::call_prepare(ggml_tensor* /*node*/, int ith, int n_threads, void* self) {
  if (ith == 0) {
    static_cast<CacheAttention*>(self)->prepare(static_cast<std::uint32_t>(n_threads));
  }
}
void CacheAttention::call_run(ggml_tensor* /*node*/, int ith, int /*n_threads*/, void* self) {
  auto& step = *static_cast<CacheAttention*>(self);
  if (Status done = step.attention_.run_together(static_cast<std::uint32_t>(ith)); !done) {
    const std::lock_guard lock(step.done_mutex_);
    step.done_ = std::move(done);
  }
}

}  // namespace zipcache::bench
