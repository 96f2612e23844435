// A small stand-in for the host engine in tests: sequences that take cells of one stream, a causal
// mask over them, and plain float attention over what the cache says it holds.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cache/attention.h"
#include "cache/layer_cache.h"
#include "ref/attention_ref.h"

namespace zipcache::cache {

struct TestDims {
  std::uint32_t n_kv_heads = 2;
  std::uint32_t group = 2;
  std::uint32_t key_dim = 32;
  std::uint32_t value_dim = 32;
  std::uint32_t n_cells = 512;
};

class TestEngine {
 public:
  struct Step {
    int sequence;
    std::uint32_t n_tokens;
  };
  struct Outcome {
    std::vector<float> out;  // [rows, heads, value_dim]
    std::vector<double> expected;
    std::vector<double> weights;  // [rows, heads, n_cells]
    double largest_value = 0;     // of V: the scale of errors
  };

  static constexpr std::uint32_t kLayer = 3;

  TestEngine(const TestDims& dims, const std::map<std::string, std::string>& settings,
             const kernels::KernelTable* kernels, std::uint32_t n_threads, std::uint64_t seed)
      : dims_(dims),
        policy_(std::make_shared<policy::Policy>(make_policy(settings))),
        budget_(std::make_shared<Budget>()),
        attention_(kernels),
        n_threads_(n_threads),
        random_(seed) {
    cache_ = make_cache();
    cell_of_.resize(dims.n_cells, -1);
  }

  LayerCache& cache() { return *cache_; }
  Budget& budget() { return *budget_; }
  const policy::Policy& policy() const { return *policy_; }
  std::mt19937_64& random() { return random_; }
  std::uint32_t free_cells() const {
    return static_cast<std::uint32_t>(std::count(cell_of_.begin(), cell_of_.end(), -1));
  }
  // Cells of a sequence in the order of its tokens.
  const std::vector<std::uint32_t>& cells(int sequence) { return sequences_[sequence]; }

  std::unique_ptr<LayerCache> make_cache() {
    auto cache = std::make_unique<LayerCache>(
        LayerCache::Shape{kLayer, dims_.n_cells, dims_.n_kv_heads * dims_.key_dim,
                          dims_.n_kv_heads * dims_.value_dim},
        policy_, budget_);
    cache->set_heads(dims_.n_kv_heads, dims_.key_dim, dims_.value_dim).value();
    return cache;
  }
  void replace_cache(std::unique_ptr<LayerCache> cache) { cache_ = std::move(cache); }

  // What the tokens of a sequence look like depends on the sequence and position alone.
  std::vector<float> row(int sequence, std::uint32_t position, std::uint32_t kind,
                         std::uint32_t width) const {
    if (kind < 2 && poison_.contains(sequence)) {
      return std::vector<float>(width, poison_.at(sequence));
    }
    std::mt19937 random(static_cast<unsigned>(sequence * 1000003 + position * 17 + kind));
    std::normal_distribution<float> normal;
    std::vector<float> values(width);
    for (std::uint32_t c = 0; c < width; ++c) {
      const float channel_scale = c % 11 == 3 ? 6.0f : 1.0f;  // outlier channels, as real keys have
      values[c] = channel_scale * (normal(random) + (c % 11 == 3 ? 1.0f : 0.0f));
    }
    return values;
  }

  // From now on the keys and values of this sequence are full of this.
  void poison(int sequence, float value) { poison_[sequence] = value; }

  // Appends tokens of several sequences in one step and attends. `scatter`: cells at random.
  Outcome step(const std::vector<Step>& steps, bool scatter) {
    std::vector<std::uint32_t> cells;
    std::vector<int> sequences;
    std::vector<std::uint32_t> positions;
    for (const Step& s : steps) {
      for (std::uint32_t i = 0; i < s.n_tokens; ++i) {
        const std::uint32_t cell = take_cell(scatter);
        cell_of_[cell] = s.sequence;
        positions.push_back(static_cast<std::uint32_t>(sequences_[s.sequence].size()));
        sequences_[s.sequence].push_back(cell);
        cells.push_back(cell);
        sequences.push_back(s.sequence);
      }
    }
    const std::uint32_t n = static_cast<std::uint32_t>(cells.size());
    put(Tensor::kKey, cells, sequences, positions);
    put(Tensor::kValue, cells, sequences, positions);
    return attend(sequences, positions, n);
  }

  // Forgets the newest tokens of a sequence without a word to the cache, as engines do.
  void remove(int sequence, std::size_t n_tokens) {
    auto& cells = sequences_[sequence];
    for (; n_tokens > 0 && !cells.empty(); --n_tokens) {
      cell_of_[cells.back()] = -1;
      cells.pop_back();
    }
  }

 private:
  // Some policies need a calibration: here of channels that are not alike.
  policy::Policy make_policy(const std::map<std::string, std::string>& settings) const {
    policy::Calibration calibration =
        policy::flat_calibration(dims_.n_kv_heads, dims_.key_dim, dims_.value_dim);
    policy::LayerCalibration& layer = calibration.layers.front();
    layer.layer = kLayer;
    for (std::vector<float>* high : {&layer.key_max, &layer.query_max, &layer.value_max}) {
      for (std::size_t c = 0; c < high->size(); ++c) {
        const std::size_t step = high == &layer.value_max ? 5 : 7;
        (*high)[c] = 0.5f + static_cast<float>(c * step % 13);
      }
    }
    return policy::make_policy(settings, &calibration).value();
  }

  // The same where each KV head sees only the tokens that it did not evict.
  ref::AttentionResult attention_of_heads(const ref::AttentionCase& c) const {
    ref::AttentionResult all;
    all.out.resize(c.n_rows * c.n_heads * c.value_dim);
    all.weights.resize(c.n_rows * c.n_heads * c.n_tokens);
    for (std::uint32_t head = 0; head < dims_.n_kv_heads; ++head) {
      std::vector<std::uint8_t> visible(c.visible.begin(), c.visible.end());
      for (std::size_t at = 0; at < visible.size(); ++at) {
        visible[at] &= holds(static_cast<std::uint32_t>(at % c.n_tokens), head) ? 1 : 0;
      }
      ref::AttentionCase one = c;
      one.visible = visible;
      const ref::AttentionResult result = ref::attention(one, /*with_weights=*/true);
      for (std::size_t row = 0; row < c.n_rows; ++row) {
        for (std::size_t h = head * dims_.group; h < (head + 1) * dims_.group; ++h) {
          const std::size_t at = row * c.n_heads + h;
          std::copy_n(&result.out[at * c.value_dim], c.value_dim, &all.out[at * c.value_dim]);
          std::copy_n(&result.weights[at * c.n_tokens], c.n_tokens, &all.weights[at * c.n_tokens]);
        }
      }
    }
    return all;
  }

  std::uint32_t take_cell(bool scatter) {
    std::vector<std::uint32_t> free;
    for (std::uint32_t cell = 0; cell < dims_.n_cells; ++cell) {
      if (cell_of_[cell] == -1) {
        free.push_back(cell);
      }
    }
    return scatter ? free[random_() % free.size()] : free.front();
  }

  void put(Tensor tensor, const std::vector<std::uint32_t>& cells,
           const std::vector<int>& sequences, const std::vector<std::uint32_t>& positions) {
    const bool keys = tensor == Tensor::kKey;
    const std::uint32_t width = dims_.n_kv_heads * (keys ? dims_.key_dim : dims_.value_dim);
    std::vector<float> rows;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      const std::vector<float> values = row(sequences[i], positions[i], keys ? 0 : 1, width);
      rows.insert(rows.end(), values.begin(), values.end());
    }
    cache_->put(tensor, cells, {rows.data(), width * sizeof(float), false}).value();
  }

  Outcome attend(const std::vector<int>& sequences, const std::vector<std::uint32_t>& positions,
                 std::uint32_t n) {
    const std::uint32_t n_heads = dims_.n_kv_heads * dims_.group;
    std::vector<Half> mask(std::size_t{n} * dims_.n_cells, 0xfc00);
    std::vector<std::uint8_t> visible(mask.size());
    std::vector<float> q;
    for (std::uint32_t r = 0; r < n; ++r) {
      for (std::uint32_t p = 0; p <= positions[r]; ++p) {
        const std::size_t bit = std::size_t{r} * dims_.n_cells + sequences_[sequences[r]][p];
        mask[bit] = 0;
        visible[bit] = 1;
      }
      const auto values = row(sequences[r], positions[r], 2, n_heads * dims_.key_dim);
      q.insert(q.end(), values.begin(), values.end());
    }
    // Expected from what the cache holds now; sealing comes after attention.
    std::vector<float> keys = held(Tensor::kKey);
    std::vector<float> values = held(Tensor::kValue);
    const float scale = 0.5f / std::sqrt(static_cast<float>(dims_.key_dim));
    ref::AttentionCase c;
    c.n_rows = n;
    c.n_heads = n_heads;
    c.n_tokens = dims_.n_cells;
    c.n_kv_heads = dims_.n_kv_heads;
    c.key_dim = dims_.key_dim;
    c.value_dim = dims_.value_dim;
    c.q = q;
    c.k = keys;
    c.v = values;
    c.visible = visible;
    c.scale = scale;
    Outcome outcome;
    ref::AttentionResult result =
        policy_->evicts ? attention_of_heads(c) : ref::attention(c, /*with_weights=*/true);
    outcome.expected = std::move(result.out);
    outcome.weights = std::move(result.weights);
    for (const float v : values) {
      outcome.largest_value = std::max<double>(outcome.largest_value, std::abs(v));
    }

    outcome.out.assign(std::size_t{n} * n_heads * dims_.value_dim, NAN);
    Visibility visibility;
    visibility.assign(mask.data(), dims_.n_cells, n, dims_.n_cells);
    Query query;
    query.q = q.data();
    query.q_row_stride = std::size_t{n_heads} * dims_.key_dim;
    query.q_head_stride = dims_.key_dim;
    query.out = outcome.out.data();
    query.out_row_stride = std::size_t{n_heads} * dims_.value_dim;
    query.out_head_stride = dims_.value_dim;
    query.n_rows = n;
    query.n_heads = n_heads;
    query.visible = &visibility;
    query.scale = scale;
    attention_.prepare(*cache_, query, n_threads_).value();
    std::vector<std::thread> threads;
    for (std::uint32_t ith = 1; ith < n_threads_; ++ith) {
      threads.emplace_back([this, ith] { attention_.run_together(ith).value(); });
    }
    attention_.run_together(0).value();
    for (std::thread& thread : threads) {
      thread.join();
    }
    return outcome;
  }

 public:
  // Whether a head has the token of a cell, that is, has not evicted it.
  bool holds(std::uint32_t cell, std::uint32_t head) const {
    const LayerCache::Slot slot = cache_->find(cell);
    if (!slot.found()) {
      return false;
    }
    const SealedBlock* block = cache_->segments()[slot.segment].block.get();
    if (block == nullptr || !block->layout->evicts()) {
      return true;
    }
    std::vector<std::uint32_t> order(block->n_tokens());
    format::slot_order(*block->layout, block->bytes.data(), head, order.data());
    const auto at = std::find(order.begin(), order.end(), slot.index) - order.begin();
    return at < block->layout->class_tokens(Tensor::kKey, 0);
  }

  // [n_cells, width] as the cache holds it.
  std::vector<float> held(Tensor tensor) const {
    const std::uint32_t width =
        dims_.n_kv_heads * (tensor == Tensor::kKey ? dims_.key_dim : dims_.value_dim);
    std::vector<Half> halves(std::size_t{dims_.n_cells} * width);
    cache_->get(tensor, 0, dims_.n_cells, halves.data());
    std::vector<float> values(halves.size());
    std::transform(halves.begin(), halves.end(), values.begin(), half_to_float);
    return values;
  }

 private:
  TestDims dims_;
  std::shared_ptr<const policy::Policy> policy_;
  std::shared_ptr<Budget> budget_;
  Attention attention_;
  std::uint32_t n_threads_;
  std::mt19937_64 random_;
  std::unique_ptr<LayerCache> cache_;
  std::vector<int> cell_of_;  // sequence that owns a cell, -1 = free
  std::map<int, std::vector<std::uint32_t>> sequences_;
  std::map<int, float> poison_;
};

}  // namespace zipcache::cache
