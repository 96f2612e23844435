#include "ggml/step.h"

#include <cstring>
#include <exception>
#include <new>
#include <utility>

#include "ggml-impl.h"
#include "ggml.h"

namespace zipcache::ggml {
namespace {

// Called by every thread of the host's pool, whatever number of tasks was asked for.
void call_step(ggml_tensor* /*node*/, int ith, int n_threads, void* userdata) {
  auto* step = static_cast<Step*>(userdata);
  StepContext& context = step->context();
  if (context.failed() || (step->threads() == Step::Threads::kOne && ith != 0)) {
    return;
  }
  try {
    Status done = step->run(static_cast<std::uint32_t>(ith), static_cast<std::uint32_t>(n_threads));
    if (!done) {
      context.fail(done.error());
    }
  } catch (const std::bad_alloc&) {
    context.fail(out_of_memory("no memory left for the KV cache"));
  } catch (const std::exception& error) {
    context.fail(invalid_argument(error.what()));
  }
}

}  // namespace

const cache::Visibility* VisibilityPool::get(const ggml_tensor* mask, std::uint32_t stream,
                                             std::uint32_t n_rows, std::uint32_t n_cells) {
  const std::uint32_t plane =
      mask == nullptr ? 0 : stream % static_cast<std::uint32_t>(mask->ne[3]);
  for (std::size_t i = 0; i < used_; ++i) {
    const Entry& entry = *entries_[i];
    if (entry.mask == mask && entry.plane == plane && entry.visibility.n_rows() == n_rows &&
        entry.visibility.n_cells() == n_cells) {
      return &entry.visibility;
    }
  }
  if (used_ == entries_.size()) {
    entries_.push_back(std::make_unique<Entry>());
  }
  Entry& entry = *entries_[used_];
  const Half* first = nullptr;
  std::size_t stride = 0;
  if (mask != nullptr) {
    first = reinterpret_cast<const Half*>(static_cast<const std::byte*>(mask->data) +
                                          plane * mask->nb[3]);
    stride = mask->nb[1] / sizeof(Half);
  }
  entry.visibility.assign(first, stride, n_rows, n_cells);
  entry.mask = mask;
  entry.plane = plane;
  ++used_;
  return &entry.visibility;
}

void StepContext::start_graph() {
  visibilities.start_graph();
  failed_.store(false, std::memory_order_relaxed);
  error_.reset();
}

void StepContext::fail(Error error) {
  const std::lock_guard lock(mutex_);
  if (!error_) {
    error_ = std::move(error);
  }
  failed_.store(true, std::memory_order_relaxed);
}

std::optional<Error> StepContext::take_error() {
  const std::lock_guard lock(mutex_);
  return std::exchange(error_, std::nullopt);
}

ggml_tensor custom_node(const ggml_tensor* original, Step* step) {
  ggml_tensor node = *original;
  node.op = GGML_OP_CUSTOM;
  const ggml_custom_op_params params = {
      .fun = call_step,
      .n_tasks = step->threads() == Step::Threads::kAll ? GGML_N_TASKS_MAX : 1,
      .userdata = step};
  std::memset(node.op_params, 0, sizeof node.op_params);
  std::memcpy(node.op_params, &params, sizeof params);
  return node;
}

}  // namespace zipcache::ggml
