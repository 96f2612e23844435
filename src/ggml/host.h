// The host's own CPU device, which does all the work that is not the KV cache. Found through ggml's
// registry, never linked: a program may have loaded one of many builds of it.
#pragma once

#include <memory>

#include "ggml-backend.h"

namespace zipcache::ggml {

struct Host {
  ggml_backend_dev_t cpu = nullptr;
  ggml_backend_buffer_type_t* extra_buffer_types = nullptr;  // null-terminated, or nullptr

  // Functions of the CPU device's registry; each may be nullptr.
  ggml_backend_set_n_threads_t set_n_threads = nullptr;
  ggml_backend_set_abort_callback_t set_abort_callback = nullptr;
  ggml_threadpool_t (*threadpool_new)(ggml_threadpool_params*) = nullptr;
  void (*threadpool_free)(ggml_threadpool_t) = nullptr;
  void (*set_threadpool)(ggml_backend_t, ggml_threadpool_t) = nullptr;
  bool has_openmp = false;
};

// The host's CPU device; `cpu` is nullptr when none is loaded.
Host find_host();

struct BackendDeleter {
  void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
};
using BackendPtr = std::unique_ptr<ggml_backend, BackendDeleter>;

// A CPU backend that computes graphs with as many threads as the host asks for.
class CpuBackend {
 public:
  // get() is nullptr when the host refuses.
  explicit CpuBackend(const Host& host);
  ~CpuBackend();
  CpuBackend(const CpuBackend&) = delete;
  CpuBackend& operator=(const CpuBackend&) = delete;

  ggml_backend_t get() const { return backend_.get(); }
  void set_n_threads(int n_threads);
  void set_abort_callback(ggml_abort_callback callback, void* data);

 private:
  const Host host_;
  BackendPtr backend_;
  // Without OpenMP a CPU backend starts and joins its threads for each graph unless it has a pool;
  // the host gives one to its own CPU backend only.
  ggml_threadpool_t pool_ = nullptr;
  int pool_threads_ = 0;
};

}  // namespace zipcache::ggml
